"""What a head took images for, to look at: a table (CSV) and a contact sheet (PNG)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from PIL import Image, ImageDraw

from pipelines.evaluate.classify import ClassifiedImages
from pipelines.report.sheets.pictures import INK, SIDE, Pictures, letters, shorten
from pipelines.storage.csv_table import encode_rows
from pipelines.storage.urls import atomic_write

_SHOWN: Final = 24  # images
_COLUMNS: Final = 3
_WIDTH: Final = 200  # of the lines beside a picture, in pixels
_MARGIN, _LINE, _LETTERS = 8, 15, 28  # pixels around a picture, of a line; letters of a line


def write_classes(folder: str, found: ClassifiedImages, names: Mapping[int, str]) -> list[str]:
    """Write `classes.csv` and `sheet.png`; what is there is replaced. The sheet shows 24 images.

    Args:
        folder: path or URL.
        found: of `pipelines.evaluate.classify.classify_source`.
        names: of classes; one without a name is shown by its id.

    Returns:
        The files.
    """
    with atomic_write(f"{folder}/classes.csv") as stream:
        stream.write(encode_rows(_table(found, names)))
    with atomic_write(f"{folder}/sheet.png") as stream:
        _sheet(found, names).save(stream, "PNG")
    return [f"{folder}/{name}" for name in ("sheet.png", "classes.csv")]


def _table(found: ClassifiedImages, names: Mapping[int, str]) -> Iterator[Sequence[object]]:
    """A row for each image and each of its best classes."""
    yield "image", "rank", "class", "name", "score"
    for key, classes, scores in zip(found.keys, found.classes, found.scores, strict=True):
        for rank, (number, score) in enumerate(zip(classes.tolist(), scores, strict=True), 1):
            if number >= 0:
                yield key, rank, number, names.get(number, ""), f"{score:.6f}"


def _sheet(found: ClassifiedImages, names: Mapping[int, str]) -> Image.Image:
    """Images, and beside each one its best classes, the best first."""
    shown = range(min(_SHOWN, len(found.keys)))
    width, height = SIDE + _WIDTH + 2 * _MARGIN, SIDE + 2 * _MARGIN
    size = (_COLUMNS * width, -(-len(shown) // _COLUMNS) * height)
    sheet = Image.new("RGB", size, "white")
    pen, font, pictures = ImageDraw.Draw(sheet), letters(), Pictures(found.source, found.keys)
    for image in shown:
        left = image % _COLUMNS * width + _MARGIN
        top = image // _COLUMNS * height + _MARGIN
        sheet.paste(Image.fromarray(pictures.read(image)), (left, top))
        lines = [found.keys[image]]
        for number, score in zip(found.classes[image].tolist(), found.scores[image], strict=True):
            if number >= 0:
                lines.append(f"{score:7.2f}  {names.get(number, number)}")
        for row, line in enumerate(lines[: SIDE // _LINE]):
            at = (left + SIDE + _MARGIN, top + row * _LINE)
            pen.text(at, shorten(line, _LETTERS), font=font, fill=INK)
    return sheet
