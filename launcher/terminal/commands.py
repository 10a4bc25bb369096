"""Commands that are printed to be pasted: quoted, and found by the shell that reads them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mhe_dist.backbone.names import is_iresnet
from mhe_dist.redact import scrub

PROGRAM_FOLDER = Path(sys.executable).parent


def command_line(words: Sequence[str]) -> str:
    """A command as one pastes it: its program as the shell finds it, every word quoted as needed.

    What it holds of secrets is replaced, as in all that is printed.

    Args:
        words: of the command; the first one names a program of this environment: mhe, mlflow,
            python.
    """
    return shlex.join([locate_program(words[0]), *map(scrub, words[1:])])


def serving_command(model: str) -> str:
    """A command that serves an MLflow model.

    MLflow starts `uvicorn` by its name, so the shell has to find what is beside it.
    """
    words = ["mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
    program, command = locate_program("mlflow"), shlex.join(map(scrub, words))
    if program == "mlflow":
        return command
    return f'PATH={shlex.quote(str(Path(program).parent.absolute()))}:"$PATH" {command}'


def invoked_command(without: str | None = None) -> str:
    """The command that this process was started with, but for an option, such as "--dry-run"."""
    return command_line(["mhe", *(word for word in sys.argv[1:] if word != without)])


def locate_program(name: str) -> str:
    """The program's name if the shell finds the one of this environment, else its path.

    A path below the working directory is given relative to it, as `.venv/bin/mhe`.
    """
    program = PROGRAM_FOLDER / name
    found = shutil.which(name)
    if not program.exists() or (found and os.path.samefile(Path(found).parent, PROGRAM_FOLDER)):
        return name
    return as_typed(str(program))


def as_typed(path: str) -> str:
    """A path below the working directory relative to it; any other path or URL as it is."""
    here = f"{Path.cwd()}{os.sep}"
    return path.removeprefix(here) or path


def fetching_code(url: str) -> str:
    """A line of Python that copies a file or folder of a store into the working directory."""
    where, name = json.dumps(url), json.dumps(fetched_name(url))
    return (
        f"import fsspec; files, path = fsspec.core.url_to_fs({where}); "
        # With the slash a folder is written over, not put into one that is there.
        f"files.get(path + '/' * files.isdir(path), {name}, recursive=files.isdir(path))"
    )


def fetched_name(url: str) -> str:
    """Where `fetching_code` puts what is at a URL; a path of this machine stays as it is."""
    return url.rpartition("/")[2] if is_in_store(url) else url


def is_in_store(url: str) -> bool:
    """Whether what takes paths alone needs a copy of what is at a path or URL."""
    return "://" in url


def viewing_steps(url: str) -> list[tuple[str, str | list[str]]]:
    """What to type to see a page or picture; one in a store is fetched first."""
    steps: list[tuple[str, str | list[str]]] = []
    if is_in_store(url):
        steps.append(("fetch it", ["python", "-c", fetching_code(url)]))
    return [*steps, ("see it", ["python", "-m", "webbrowser", fetched_name(url)])]


def loading_code(export: str, path: str, model: str = "") -> str:
    """A line of Python that loads an exported backbone.

    Args:
        export: format: timm, onnx or torch-export.
        path: of the folder or file.
        model: name of the timm model; one that is mhe's own has to be imported first.
    """
    where = json.dumps(path if export != "timm" else f"local-dir:{path}")
    if export == "timm":
        ours = "mhe_dist.backbone.iresnet, " if is_iresnet(model) else ""
        return f"import {ours}timm; timm.create_model({where}, pretrained=True)"
    if export == "onnx":
        return f"import onnxruntime; onnxruntime.InferenceSession({where})"
    return f"import torch; torch.export.load({where}).module()"
