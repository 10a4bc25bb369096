"""What must be right before anything is started: the data is there, a run is not mixed up."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from launcher.terminal.commands import command_line
from mhe_dist.backbone.names import is_iresnet
from mhe_dist.checkpoint.step_folder import describe_siblings, step_of
from mhe_dist.config.data import HELDOUT, KNOWN, TRAIN
from mhe_dist.config.schema import Config, EvaluateConfig
from mhe_dist.config.section import local_path
from mhe_dist.errors import UserError, list_choices
from pipelines.shards.image_format import IMAGE_EXTENSIONS
from pipelines.shards.index import INDEX_FILE, index_exists, name_data_sets
from pipelines.shards.label_set import LABELS_FILE, label_set_exists
from pipelines.storage.urls import is_local_url, url_exists

Mistake = tuple[str, str]
"""The dotted key and what is wrong with its value."""

_LOOKED_INTO = 20  # class folders in which images are looked for


def check_data(config: Config) -> Iterable[Mistake]:
    """What is wrong with the paths of the data (a check of `mhe_dist.config.load.load_config`).

    Shards must exist; `data.glyphs` makes those that it is known to write: a folder `train`, and
    those beside it (`GlyphsConfig.set_names`).
    """
    glyphs = config.data.glyphs is not None
    train, heldout = config.data.shards.rstrip("/"), config.evaluate.shards.rstrip("/")
    made = set()
    if config.data.glyphs and train.rpartition("/")[2] == TRAIN:
        made = {train.removesuffix(TRAIN) + name for name in config.data.glyphs.set_names}
    sets = {
        "data.shards": train,
        "evaluate.shards": heldout,
        "evaluate.classification": config.evaluate.classification.rstrip("/"),
        "evaluate.labels": config.evaluate.labels.rstrip("/"),
        **{f"data.mix.{n}.shards": item.shards for n, item in enumerate(config.data.mix)},
    }
    for key, url in sets.items():
        if url and url not in made and (problem := _problem(url, index_exists, INDEX_FILE)):
            inside = name_data_sets(url) if Path(url).is_dir() else ""
            cure = inside or _cure_for_sources(key, url) or _cure(key, glyphs)
            yield key, f"{problem}; {cure}"
            if glyphs:
                return  # where the held-out set would be made follows from data.shards
    mixed = ((f"data.mix.{n}.labels", item.labels) for n, item in enumerate(config.data.mix))
    label_sets = {
        "data.labels": config.data.labels,
        "evaluate.label_set": config.evaluate.label_set,
    }
    for key, url in (*label_sets.items(), *mixed):
        if url and (problem := _problem(url, label_set_exists, LABELS_FILE)):
            yield key, f"{problem}; give a folder that `mhe data labels` made"
    begins = {
        "model.init_from": (config.model.init_from, "a .pth file, an exported folder or a run"),
        "head.init_from": (config.head.init_from, "a run or one of its step_* folders"),
    }
    for key, (source, wanted) in begins.items():
        if source and not url_exists(source):
            beside = f"; {describe_siblings(source)}" if step_of(source) is not None else ""
            yield key, f"does not exist; give {wanted}{beside}"
    for path in config.evaluate.verification:
        if not url_exists(path):
            yield "evaluate.verification", f"{path} does not exist; give InsightFace .bin files"


def check_names(config: Config) -> Iterable[Mistake]:
    """What names nothing, the backbone or the figure of the best checkpoint; a neck that cannot be.

    A check of `mhe_dist.config.load.load_config`. Without it, a run of a figure that no evaluation
    gives would end without the checkpoint that it was to keep.
    """
    yield from _backbone_mistakes(config.model.name)
    if is_iresnet(config.model.name) and config.model.neck == "batchnorm":
        yield "model.neck", f"{config.model.name} ends with a BatchNorm of its own; give none"
    figure = config.checkpoint.keep_best.removeprefix("-")
    if figure and (problem := explain_unknown_figure(figure, config.evaluate)):
        yield "checkpoint.keep_best", problem


def _backbone_mistakes(name: str) -> Iterable[Mistake]:
    """What is wrong with the name of a backbone.

    timm itself takes seconds to import, so it is asked only about a name that no source defines in
    the usual way.
    """
    if _defined_in_source(name):
        return
    from mhe_dist.backbone.model import check_model_name

    try:
        check_model_name(name)
    except UserError as error:
        yield "model.name", str(error).partition(": ")[2]


def explain_unknown_figure(name: str, settings: EvaluateConfig) -> str:
    """That no evaluation of a run gives a figure, and those there are; empty: one may give it."""
    from pipelines.evaluate.in_training import figure_names  # it imports torch

    names = figure_names(settings)
    return "" if name in names else f"no evaluation gives it; {list_choices(name, names)}"


def _defined_in_source(name: str) -> bool:
    """Whether a file of timm's models, or of ours, registers that name."""
    ours = find_spec("mhe_dist.backbone.iresnet")
    files = [Path(ours.origin)] if ours and ours.origin else []
    found = find_spec("timm")
    for folder in (found.submodule_search_locations or []) if found else []:
        files += Path(folder, "models").glob("*.py")
    definition = f"@register_model\ndef {name}("
    return any(definition in file.read_text(encoding="utf-8") for file in files)


def _problem(url: str, exists: Callable[[str], bool], file: str) -> str:
    """What is wrong with a folder that has to hold a file; `exists` says whether it does."""
    try:
        if exists(url):
            return ""
    except UserError as error:
        return f"cannot be read: {error}"
    missing = is_local_url(url) and not os.path.exists(local_path(url))
    return "there is no such folder" if missing else f"there is no {file} in it"


def _cure_for_sources(key: str, url: str) -> str:
    """The command that makes shards of what lies in a local folder; empty: nothing known does."""
    folder = Path(url.removeprefix("file://"))
    if not folder.is_dir():
        return ""
    top = _names(folder)
    out = f"{folder}-shards"
    for name in top:
        if name.endswith(".rec"):
            words = ["mhe", "data", "recordio", "--rec", str(folder / name), "--out", out]
            return f"it holds RecordIO: {command_line(words)}, then {key}={shlex.quote(out)}"
    if any(name.endswith(".tar") for name in top):
        return f"it holds tars without an index: {command_line(['mhe', 'data', 'index', url])}"
    below = [folder / name for name in top if (folder / name).is_dir()]
    words = ["mhe", "data", "folder", "--root", str(folder), "--out", out]
    if any(_is_image(name) for each in below[:_LOOKED_INTO] for name in _names(each)):
        return f"it is a folder of images: {command_line(words)}, then {key}={shlex.quote(out)}"
    if any(map(_is_image, top)):
        return (
            "its images lie in no class folder: give each class a folder, or name the classes in a "
            f"table of path and class: {command_line([*words, '--table', 'FILE.csv'])}"
        )
    return ""


def _names(folder: Path) -> list[str]:
    """Names of the first files and folders in a folder, sorted; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in islice(entries, 1000) if entry.name[0] != ".")


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _cure(key: str, glyphs: bool) -> str:
    shards = (
        "give a folder of indexed shards, which `mhe data` makes (a file of mhe init names the "
        "command at its top)"
    )
    if key.startswith("data.mix"):
        return shards
    if not glyphs:
        return f"{shards}, or set data.glyphs={{}} to make the glyph data set"
    if key == "evaluate.classification":
        name = f"{KNOWN!r} beside data.shards with data.glyphs.known_classes=true"
    else:
        name = repr(TRAIN if key == "data.shards" else HELDOUT)
    return f"{shards}, or one named {name} for data.glyphs to make"


def check_selection(config: Config) -> None:
    """Refuse a choice of sets, classes and images that cannot be trained on, or by this head.

    Reads the indexes, if anything is chosen.

    Raises:
        UserError: names the file or the key, and the cure.
    """
    from pipelines.data.mixture.index import (
        needs_mixture,
        open_training_index,
        samples_per_epoch,
    )

    head, mixed = config.head, needs_mixture(config.data)
    if not (mixed or head.lengths):
        return
    chosen = open_training_index(config.data, config.run.seed)
    if mixed and samples_per_epoch(chosen) < config.data.streams:
        raise UserError(
            f"data.streams={config.data.streams}: an epoch has {samples_per_epoch(chosen)} "
            "samples only; choose more of them, or give at most that many streams"
        )
    if head.lengths:
        from mhe_dist.heads.multilevel.base import MixedRadix  # it imports torch

        MixedRadix.of(chosen.num_classes, head.lengths, f"head.{head.kind}.lengths")
