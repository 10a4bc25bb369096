"""The folder of an export may hold other things: what no export wrote is never replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from mhe_dist.errors import UserError
from pipelines.serving.model_card import CARD, is_model_card
from pipelines.storage.urls import list_folder, resolve_url

_OF_A_RUN: Final = {"config.yaml", "checkpoints"}
_SCRIPT: Final = "image_model.py"  # in each MLflow model of ours, and in no other
_TIMM_FILES: Final = {"config.json", "model.safetensors", CARD}
_HUB_FILES: Final = _TIMM_FILES | {"onnx"}


def refuse_overwriting(folder: str, formats: Iterable[str], with_head: bool = False) -> None:
    """Refuse an export into a folder where it would replace what is not an export's.

    Args:
        folder: path or URL that gets the files; it may not exist.
        formats: names of the formats that are to be written.
        with_head: whether they hold the head, too.

    Raises:
        UserError: it is the folder of a run, or names what would be replaced.
    """
    names = _names(folder)
    if _OF_A_RUN.issubset(names):
        raise UserError(
            f"--out={folder}: is the folder of a run, whose own files an export could replace; "
            "give another folder, or leave --out out for export/ of the run"
        )
    checks: dict[str, tuple[str, Callable[[str], bool]]] = {
        "timm": ("timm", _is_our_timm_folder),
        "hub-folder": ("hub", _is_our_hub_folder),
        "mlflow": ("mlflow-classifier" if with_head else "mlflow", _is_our_mlflow_model),
    }
    found = [CARD] if CARD in names and not _is_our_card(f"{folder}/{CARD}") else []
    for inner, is_ours in (checks[name] for name in formats if name in checks):
        if not is_ours(f"{folder}/{inner}"):
            found.append(f"{inner}/")
    if found:
        raise UserError(
            f"--out={folder}: {', '.join(found)} there was not written by mhe export, which would "
            "replace it; move it away, or give another folder"
        )


def _is_our_timm_folder(folder: str) -> bool:
    """Whether nothing but an export of ours is replaced in it; other files in it stay."""
    return not _names(folder) & _TIMM_FILES or _is_our_card(f"{folder}/{CARD}")


def _is_our_hub_folder(folder: str) -> bool:
    """Whether all of it is an export of ours: it is removed as a whole."""
    names, onnx = _names(folder), _names(f"{folder}/onnx")
    is_export = names <= _HUB_FILES and all(name.startswith("model.onnx") for name in onnx)
    return not names or (is_export and _is_our_card(f"{folder}/{CARD}"))


def _is_our_mlflow_model(folder: str) -> bool:
    names = _names(folder)
    return not names or _SCRIPT in names


def _names(folder: str) -> set[str]:
    return {path.rpartition("/")[2] for path in list_folder(folder)}


def _is_our_card(url: str) -> bool:
    """Whether there is a card that `write_model_card` wrote; whoever publishes it may add to it."""
    filesystem, path = resolve_url(url)
    try:
        text = filesystem.cat_file(path)
    except FileNotFoundError:
        return False
    return is_model_card(text.decode(errors="replace"))
