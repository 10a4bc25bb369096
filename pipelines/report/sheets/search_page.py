"""What a search found, to look at: a table (CSV), a contact sheet (PNG), a page (HTML)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from PIL import Image, ImageDraw

from pipelines.data.decode import Pixels
from pipelines.embedding.embed import EmbeddedImages
from pipelines.evaluate.search import SearchResult
from pipelines.report.page import render_page
from pipelines.report.sheets.pictures import (
    GREY,
    INK,
    SIDE,
    Pictures,
    as_data_url,
    letters,
    shorten,
)
from pipelines.storage.csv_table import encode_rows
from pipelines.storage.urls import atomic_write

_SHEET_ROWS: Final = 12
_PAGE_ROWS: Final = 200
_MARGIN, _TEXT = 8, 34  # pixels around a picture, below it
_GREEN = (46, 158, 107)

Colour = tuple[int, int, int]


def write_search(
    folder: str, title: str, gallery: EmbeddedImages, queries: EmbeddedImages, found: SearchResult
) -> list[str]:
    """Write `results.csv`, `sheet.png` and `index.html`; what is there is replaced.

    The page holds all its pictures and needs no network. It shows 200 queries, the sheet 12.

    Args:
        folder: path or URL.
        title: of the page.
        gallery, queries, found: of `pipelines.evaluate.search.search`.

    Returns:
        The files.
    """
    images = Pictures(queries.source, queries.keys), Pictures(gallery.source, gallery.keys)
    with atomic_write(f"{folder}/results.csv") as stream:
        stream.write(encode_rows(results_table(gallery, queries, found)))
    with atomic_write(f"{folder}/sheet.png") as stream:
        _sheet(gallery, queries, found, *images).save(stream, "PNG")
    values = _page_values(title, gallery, queries, found, *images)
    render_page("sheets/search.html.j2", f"{folder}/index.html", values)
    return [f"{folder}/{name}" for name in ("index.html", "sheet.png", "results.csv")]


def results_table(
    gallery: EmbeddedImages, queries: EmbeddedImages, found: SearchResult
) -> Iterator[Sequence[object]]:
    """A header, and a row for each query and each entry that it found."""
    yield "query", "query_class", "rank", "score", "entry", "class"
    for query, (numbers, scores) in enumerate(zip(found.numbers, found.scores, strict=True)):
        for rank, (number, score) in enumerate(zip(numbers, scores, strict=True), 1):
            own = queries.keys[query], queries.classes[query], rank, f"{score:.6f}"
            yield *own, gallery.keys[number], gallery.classes[number]


def _sheet(
    gallery: EmbeddedImages,
    queries: EmbeddedImages,
    found: SearchResult,
    of_queries: Pictures,
    of_gallery: Pictures,
) -> Image.Image:
    """Queries on the left, what they found beside them; green frames: of the same class."""
    rows, columns = min(_SHEET_ROWS, len(queries.keys)), 1 + found.numbers.shape[1]
    width, height = SIDE + 2 * _MARGIN, SIDE + _TEXT + _MARGIN
    sheet = Image.new("RGB", (columns * width + 2 * _MARGIN, rows * height + _MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), letters()

    def put(row: int, column: int, pixels: Pixels, lines: list[str], frame: Colour) -> None:
        """Draw a picture with the lines under it; column 0 stands apart."""
        left = column * width + _MARGIN + (2 * _MARGIN if column else 0)
        top = row * height + _MARGIN
        box = (left - 3, top - 3, left + SIDE + 2, top + SIDE + 2)
        pen.rectangle(box, outline=frame, width=3)
        sheet.paste(Image.fromarray(pixels), (left, top))
        for number, line in enumerate(lines):
            at = (left, top + SIDE + 5 + 13 * number)
            pen.text(at, shorten(line), font=font, fill=INK)

    for row in range(rows):
        own = queries.classes[row]
        put(row, 0, of_queries.read(row), [own or queries.keys[row], "query"], GREY)
        for column, number in enumerate(found.numbers[row].tolist()):
            name = gallery.classes[number] or gallery.keys[number]
            frame = _GREEN if own and gallery.classes[number] == own else GREY
            lines = [name, f"{found.scores[row, column]:.3f}"]
            put(row, column + 1, of_gallery.read(number), lines, frame)
    return sheet


def _page_values(
    title: str,
    gallery: EmbeddedImages,
    queries: EmbeddedImages,
    found: SearchResult,
    of_queries: Pictures,
    of_gallery: Pictures,
) -> dict[str, Any]:
    shown = min(_PAGE_ROWS, len(queries.keys))
    pictures: dict[int, str] = {}
    rows = []
    for row in range(shown):
        entries = []
        for column, number in enumerate(found.numbers[row].tolist()):
            if number not in pictures:
                pictures[number] = as_data_url(of_gallery.read(number))
            own = queries.classes[row]
            entry = {
                "picture": pictures[number],
                "name": gallery.classes[number] or gallery.keys[number],
                "key": gallery.keys[number],
                "score": f"{found.scores[row, column]:.3f}",
                "same": bool(own) and gallery.classes[number] == own,
            }
            entries.append(entry)
        query = {
            "picture": as_data_url(of_queries.read(row)),
            "name": queries.classes[row] or queries.keys[row],
            "key": queries.keys[row],
        }
        rows.append((query, entries))
    return {
        "title": title,
        "rows": rows,
        "more": len(queries.keys) - shown,
        "gallery": len(gallery.keys),  # the title names what was typed, and no path of this machine
        "queries": len(queries.keys),
        "search": found.describe(),
    }
