"""Sheets and tables of images whose names are no UTF-8: they are spelled out, not refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.embedding.embed import EmbeddedImages
from pipelines.evaluate.classify import ClassifiedImages
from pipelines.evaluate.search import search
from pipelines.report.sheets.class_sheet import write_classes
from pipelines.report.sheets.search_page import write_search

KEYS = ["caf\udce9.png", "b" * 60 + ".png"]


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A folder with both images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for key in KEYS:
        Image.new("RGB", (9, 9), (200, 30, 30)).save(folder / key)
    return str(folder)


def test_classes(source: str, tmp_path: Path) -> None:
    classes, scores = np.array([[4, 1], [2, -1]]), np.array([[9.5, 1.25], [3.0, -np.inf]])
    found = ClassifiedImages(source, KEYS, classes, scores, [])
    files = write_classes(str(tmp_path / "out"), found, {4: "caf\udce9", 1: "a, b", 2: "=1+1"})
    assert files == [f"{tmp_path}/out/sheet.png", f"{tmp_path}/out/classes.csv"]
    assert (tmp_path / "out" / "classes.csv").read_text(encoding="utf-8").splitlines() == [
        "image,rank,class,name,score",
        "caf\\udce9.png,1,4,caf\\udce9,9.500000",
        'caf\\udce9.png,2,1,"a, b",1.250000',
        f"{KEYS[1]},1,2,'=1+1,3.000000",
    ]
    with Image.open(files[0]) as sheet:
        assert sheet.getpixel((20, 20)) == (200, 30, 30)


def test_search(source: str, tmp_path: Path) -> None:
    rows = np.eye(2, dtype=np.float32)
    known = EmbeddedImages(source, rows, KEYS, ["caf\udce9", "b"], None, [])
    queries = known._replace(source=f"{source}/.")
    page, _, table = write_search(
        str(tmp_path / "out"), "caf\udce9", known, queries, search(known, queries, 1)
    )
    text = Path(page).read_text(encoding="utf-8")
    assert "caf\\udce9" in text
    assert f"{len(KEYS)} queries among {len(KEYS)} images" in text
    assert source not in text, "paths of this machine stay here"
    assert "caf\\udce9.png" in Path(table).read_text(encoding="utf-8")
