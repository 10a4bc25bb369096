"""Writes a page from its parts: one HTML file that needs no network, dark or light."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from mhe_dist.storage_errors import ABSENT
from mhe_dist.storage_retry import with_retries
from pipelines.report.charts.chart import DrawnChart
from pipelines.storage.urls import atomic_write, resolve_url


@dataclass
class Picture:
    """A PNG in base64, and the text that describes it."""

    alt: str
    data: str


@dataclass(frozen=True)
class ImageCard:
    """An image of a data set with what is below it.

    Attributes:
        url: of the image; empty: it cannot be had.
        name: below it.
        note: below the name.
        mark: `right`, `wrong` or empty: the colour of its frame.
    """

    url: str
    name: str
    note: str = ""
    mark: str = ""


@dataclass(frozen=True)
class ImageRow:
    """Images that belong together, and what is said of them."""

    cards: Sequence[ImageCard]
    text: str = ""


@dataclass
class PageSection:
    """A section of the page; the template leaves out what is empty.

    Attributes:
        title, text: at its head.
        charts: side by side, as many as there is room for.
        pictures: PNG.
        image_rows: rows of images.
        head, rows: a table.
        summary, pre: text that opens.
    """

    title: str
    text: str = ""
    charts: list[DrawnChart] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    image_rows: list[ImageRow] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    summary: str = ""
    pre: str = ""


def write_page(
    out: str,
    name: str,
    subtitle: str,
    tiles: Sequence[tuple[str, str]],
    sections: Sequence[PageSection],
) -> None:
    """Write a page from its parts; an existing file is replaced.

    Args:
        out: path or URL of the page.
        name: its title.
        subtitle: below the title.
        tiles: the most important figures, as (name, value).
        sections: in their order.
    """
    values = {"name": name, "subtitle": subtitle, "tiles": tiles, "sections": sections}
    render_page("page.html.j2", out, values)


def render_page(template: str, out: str, values: Mapping[str, Any]) -> None:
    """Write a page from a template of this folder; an existing file is replaced.

    Args:
        template: its path below this folder.
        out: path or URL of the page.
        values: what it shows, by name.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template(template).render(**values)
    with atomic_write(out) as stream:
        stream.write(page.encode(errors="backslashreplace"))  # names need not be UTF-8


def picture(alt: str, content: bytes) -> Picture:
    """A PNG for a page, with the text that describes it."""
    return Picture(alt, base64.b64encode(content).decode())


def read_bytes(url: str) -> bytes | None:
    """The file at a path or URL; None if there is none.

    Raises:
        OSError: it may not be read; the error is the store's own.
        RunError: its server does not answer.
    """
    filesystem, path = resolve_url(url)
    try:
        return bytes(with_retries(lambda: filesystem.cat_file(path), url))
    except ABSENT:
        return None
