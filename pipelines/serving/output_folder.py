"""The folder of an export: a record of what was written into it, and what may be replaced there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from mhe_dist.backbone.export import DEFAULT_OPTIONS, ExportOptions
from mhe_dist.errors import UserError
from mhe_dist.storage_retry import remove_if_exists, with_retries
from pipelines.serving.model_card import CARD, TrainedModel, is_model_card, write_model_card
from pipelines.storage.staging import staged_output
from pipelines.storage.urls import atomic_write, list_folder, resolve_url

RECORD: Final = "exports.json"
NAMES_FILE: Final = "class_names.tsv"  # not classes.tsv, which a data set has
_FORMAT: Final = "format"
_OF_A_RUN: Final = {"config.yaml", "checkpoints"}
_SCRIPT: Final = "image_model.py"  # in each MLflow model of ours, and in no other
_TIMM_FILES: Final = {"config.json", "model.safetensors", CARD}
_HUB_FILES: Final = _TIMM_FILES | {"onnx"}

Record = dict[str, dict[str, str]]
"""Name of each file or folder of an export -> `format`, and of what it is: see
`TrainedModel.identity`. An export that was broken off while it took its place is of nothing."""


def export_name(format_name: str, options: ExportOptions, with_head: bool = False) -> str:
    """The file or folder that a format is written to."""
    stem = "classifier" if with_head else "backbone"
    kinds = ("_uint8" if options.pixels else "") + ("_fp16" if options.half else "")
    return {
        "timm": "timm",
        "onnx": f"{stem}{kinds}.onnx",
        "torch-export": f"{stem}.pt2",
        "mlflow": "mlflow-classifier" if with_head else "mlflow",
        "hub-folder": "hub",
    }[format_name]


@contextmanager
def staged_export(
    folder: str, name: str, format_name: str, trained: TrainedModel, whole: bool = False
) -> Iterator[str]:
    """A path for an export, which takes its place, with record and card, when the block ends.

    Args:
        folder: path or URL of the exports.
        name: of the file or folder in it.
        format_name: as the card calls it.
        trained: what is exported.
        whole: see `staged_output`, which this is but for record and card.
    """
    with staged_output(folder, name, whole) as path:
        yield path
        # Before it is there: what is broken off now may be replaced by the next one.
        _write_record(folder, name, {_FORMAT: format_name})
    identity = trained.identity()
    record = _write_record(folder, name, {_FORMAT: format_name, **identity})
    same = {name: about[_FORMAT] for name, about in record.items() if _is_of(about, identity)}
    others = {
        name: f"{about['run']}, step {int(about['step']):,}" if "run" in about else "broken off"
        for name, about in record.items()
        if name not in same
    }
    # The plain file of a format comes first, and is the one that the card shows.
    exports = {same[name]: name for name in sorted(same, reverse=True)}
    write_model_card(folder, trained, exports, others)


def remove_other_names(folder: str, trained: TrainedModel) -> None:
    """Remove names of classes that an earlier export wrote, and that are not of this model."""
    about = (_read_record(folder) or {}).get(NAMES_FILE)
    if about is not None and not _is_of(about, trained.identity()):
        remove_if_exists(*resolve_url(f"{folder}/{NAMES_FILE}"))


def _is_of(about: dict[str, str], identity: dict[str, str]) -> bool:
    return identity.items() <= about.items()


def _read_record(folder: str) -> Record | None:
    """What was written into a folder; None: the file is no such record."""
    filesystem, path = resolve_url(f"{folder}/{RECORD}")
    try:
        record: Record = json.loads(with_retries(lambda: filesystem.cat_file(path), folder))
        return record if all(_FORMAT in about for about in record.values()) else None
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError):
        return None


def _write_record(folder: str, name: str, about: dict[str, str]) -> Record:
    """Enter an export, and forget those that are gone; all that there are."""
    there = _names(folder)
    known = {each: old for each, old in (_read_record(folder) or {}).items() if each in there}
    record = dict(sorted((known | {name: about}).items()))
    with atomic_write(f"{folder}/{RECORD}") as stream:
        stream.write(json.dumps(record, indent=1).encode())
    return record


def refuse_overwriting(
    folder: str,
    formats: Iterable[str],
    with_head: bool = False,
    options: ExportOptions = DEFAULT_OPTIONS,
) -> None:
    """Refuse an export into a folder where it would replace what is not an export's.

    Args:
        folder: path or URL that gets the files; it may not exist.
        formats: names of the formats that are to be written.
        with_head: whether they hold the head, too.
        options: of the export.

    Raises:
        UserError: it is the folder of a run, or names what would be replaced.
    """
    if _OF_A_RUN.issubset(_names(folder)):
        raise UserError(
            f"--out={folder}: is the folder of a run, whose own files an export could replace; "
            "give another folder, or leave --out out for export/ of the run"
        )
    if found := foreign_files(folder, formats, with_head, options):
        raise UserError(
            f"--out={folder}: {', '.join(found)} there was not written by mhe export, which would "
            "replace it; move it away, or give another folder"
        )


def foreign_files(
    folder: str,
    formats: Iterable[str],
    with_head: bool = False,
    options: ExportOptions = DEFAULT_OPTIONS,
) -> list[str]:
    """Files and folders that exports would replace, and that are not of an export.

    Args:
        folder, formats, with_head, options: see `refuse_overwriting`.
    """
    there, record = _names(folder), _read_record(folder)
    checks: dict[str, Callable[[str], bool]] = {
        "timm": _is_our_timm_folder,
        "hub": _is_our_hub_folder,
        "mlflow": _is_our_mlflow_model,
        "mlflow-classifier": _is_our_mlflow_model,
    }
    found = [CARD] if CARD in there and not _is_our_card(f"{folder}/{CARD}") else []
    found += [RECORD] if record is None else []
    names = [export_name(each, options, with_head) for each in formats]
    broken_off = {name for name, about in (record or {}).items() if "run" not in about}
    for name in [*names, *([NAMES_FILE] if with_head else [])]:
        if name in broken_off:  # in the middle, perhaps, with no card yet
            continue
        if check := checks.get(name):
            found += [] if check(f"{folder}/{name}") else [f"{name}/"]
        elif name in there - set(record or {}):
            found.append(name)
    return found


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
        text: bytes = with_retries(lambda: filesystem.cat_file(path), url)
    except FileNotFoundError:
        return False
    return is_model_card(text.decode(errors="replace"))
