"""`mhe data ...`: making shards, and looking at them."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.tasks.choose import choose_workers
from launcher.terminal import console
from launcher.terminal.progress import ProgressDisplay
from launcher.verbs.data import check, convert, labels
from launcher.verbs.options import AddressOption, Processes
from launcher.verbs.outputs import usable_folder
from mhe_dist.config.data import HELDOUT, KNOWN, TRAIN, GlyphsConfig
from pipelines.shards.index import ShardIndex

DEFAULTS = GlyphsConfig()

app = typer.Typer(no_args_is_help=True, help="Make and check the tar shards that a run streams.")


@app.callback()
def data() -> None:
    """Make and check the tar shards that a run streams."""


app.command()(convert.recordio)
app.command()(convert.folder)


@app.command()
def glyphs(
    out: Annotated[
        str,
        typer.Option(
            help="Folder for the shards; train/ and heldout/ are made.", callback=usable_folder
        ),
    ],
    fonts: Annotated[
        str, typer.Option(help="Folder with fonts in or below it; those of matplotlib if left out.")
    ] = "",
    heldout_fonts: Annotated[
        list[str], typer.Option(help="Names (* and ?) of font files kept for the evaluation.")
    ] = DEFAULTS.heldout_fonts,
    heldout_classes: Annotated[
        int, typer.Option(min=1, help="Characters kept for the evaluation.")
    ] = DEFAULTS.heldout_classes,
    min_fonts: Annotated[
        int, typer.Option(min=1, help="A character needs a glyph in this many font files.")
    ] = DEFAULTS.min_fonts,
    max_classes: Annotated[
        int, typer.Option(min=0, help="Most characters for training, drawn at random; 0: all.")
    ] = DEFAULTS.max_classes,
    known_classes: Annotated[
        bool,
        typer.Option(help="Also make known/: the training's characters in the held-out fonts."),
    ] = DEFAULTS.known_classes,
    image_size: Annotated[
        int, typer.Option(min=1, help="Side of the images in pixels.")
    ] = DEFAULTS.image_size,
    processes: Processes = 0,
    address: AddressOption = "",
) -> None:
    """Draw the characters of a folder of fonts: a class is a character, its images the typefaces.

    Characters with the same image are one class, and blanks are left out. The held-out set has
    characters that training never sees, also in typefaces that it never sees.

    Example: mhe data glyphs --fonts /usr/share/fonts/truetype/noto --out data/noto
    """
    from pipelines.sources.glyphs.build import write_glyphs

    settings = GlyphsConfig(
        fonts=fonts,
        heldout_fonts=heldout_fonts,
        heldout_classes=heldout_classes,
        min_fonts=min_fonts,
        max_classes=max_classes,
        known_classes=known_classes,
        image_size=image_size,
    )
    with (
        convert.resumable(),
        choose_workers(processes, address=address) as workers,
        ProgressDisplay().counting("drawing the data set") as progress,
    ):
        write_glyphs(fonts, out, settings, progress, workers)
    for name in settings.set_names:
        console.say(convert.describe(ShardIndex.load(f"{out}/{name}")))
    console.list_next([("train on it", ["mhe", "train", "quickstart", *_overrides(out, settings)])])


def _overrides(out: str, settings: GlyphsConfig) -> list[str]:
    """What lets the quickstart train on these glyphs."""
    words = ["run.name=glyphs", "data.glyphs=null", f"data.image_size={settings.image_size}"]
    words += [f"data.shards={out}/{TRAIN}", f"evaluate.shards={out}/{HELDOUT}"]
    known = [f"evaluate.classification={out}/{KNOWN}"] if settings.known_classes else []
    return [*words, *known]


app.command()(check.index)
app.command()(check.verify)
app.command()(check.show)
app.add_typer(labels.app, name="labels")
