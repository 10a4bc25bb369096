"""The page of an audit, from a small table of findings: what it says, shows and gives back."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mhe_dist.errors import UserError
from pipelines.report.audit.findings import KINDS, ClassMembers, read_findings
from pipelines.report.audit.page import write_audit_page
from pipelines.shards.index import ShardIndex
from pipelines.shards.writer import Sample, ShardWriter
from pipelines.storage.csv_table import spell_out
from tests.support.data.images import encoded
from tests.support.data.label_sets import write_labels

SCHEMA = {
    **dict.fromkeys(("kind", "key"), pa.string()),
    **dict.fromkeys(("sample", "class"), pa.int64()),
    "class_name": pa.string(),
    "neighbour_class": pa.int64(),
    **dict.fromkeys(("neighbour_name", "neighbour_key"), pa.string()),
    "neighbour_sample": pa.int64(),
    "neighbour_set": pa.string(),
    **dict.fromkeys(("score", "probability"), pa.float32()),
    "group": pa.int64(),
    "action": pa.string(),
}
CLASSES, EACH = 6, 5


def finding(kind: str, **values: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {
        name: "" if pa.types.is_string(each) else -1 for name, each in SCHEMA.items()
    }
    row = empty | {"kind": kind, "score": 0.5, "probability": 0.975, "action": "none"} | values
    if row["class"] >= 0:
        row["class_name"] = f"name{row['class']}"
    if row["neighbour_class"] >= 0:
        row["neighbour_name"] = f"name{row['neighbour_class']}"
    return row


def stray(sample: int, own: int, other: int) -> dict[str, Any]:
    key = f"t{sample}"
    return finding("wrong_label", key=key, sample=sample, **{"class": own}, neighbour_class=other)


FINDINGS = [
    finding("duplicate_classes", **{"class": 0}, neighbour_class=1, group=7, action="merge"),
    finding("mixed_class", key="t2", sample=2, **{"class": 2}, group=1, action="split"),
    finding("mixed_class", key="t8", sample=8, **{"class": 2}, group=1, action="split"),
    finding("mixed_class", key="t3", sample=3, **{"class": 3}, group=1, action="split"),
    *(stray(sample, sample % CLASSES, 5) for sample in (4, 10, 16)),
    finding("foreign", key="t9", sample=9, **{"class": 3}, neighbour_class=0, action="drop"),
    finding(
        "leak",
        key="t<b>",
        sample=11,
        **{"class": 5},
        neighbour_key="h1",
        neighbour_sample=1,
        neighbour_set="held",
    ),
    finding("leak", **{"class": 4}, neighbour_key="somebody", neighbour_set="held"),
]
FIGURES = {
    "false_rate": 0.01,
    "totals": {
        "images": 30,
        "classes": 6,
        "images_doubted": 5,
        "classes_doubted": 4,
        "seconds": 90.0,
    },
    "kinds": {
        "wrong_label": {
            "count": 3,
            "threshold": 0.25,
            "expected_false": 0.2,
            "examined": 30,
            "unit": "images",
            "statistic": "margin",
            "histogram": {"edges": [-0.5, 0.0, 0.25, 0.5], "counts": [20, 7, 3]},
            "recall": 0.995,
        },
    },
}


def write_set(folder: str, prefix: str, count: int) -> ShardIndex:
    def jpeg(number: int) -> bytes:
        return encoded(Image.new("RGB", (8, 8), (7 * number, 40, 90)), "JPEG")

    with ShardWriter(folder, prefix) as writer:
        writer.write(
            Sample(f"{prefix}{n}", {"jpg": jpeg(n), "cls": str(n % CLASSES).encode()})
            for n in range(count)
        )
        writer.finish(CLASSES)
    return ShardIndex.load(folder)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_set(str(tmp_path_factory.mktemp("data") / "train"), "t", CLASSES * EACH)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_set(str(tmp_path_factory.mktemp("data") / "heldout"), "h", 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audit")
    pq.write_table(
        pa.Table.from_pylist(FINDINGS, pa.schema(SCHEMA.items())), out / "findings.parquet"
    )
    (out / "figures.json").write_text(json.dumps(FIGURES))
    return out


@pytest.fixture(scope="module")
def page(folder: Path, index: ShardIndex, heldout: ShardIndex) -> str:
    written = write_audit_page(str(folder), index, None, {"held": heldout.folder}, limit=2)
    assert written == f"{folder}/audit.html"
    return Path(written).read_text()


def articles(page: str) -> list[str]:
    return re.findall(r"<article.*?</article>", page, re.DOTALL)


def test_every_kind_has_a_section_and_says_how_many_there_are(page: str) -> None:
    for name, text in KINDS.items():
        assert f'<section id="{name}">' in page and text.title in page
    assert page.count("<article") == 1 + 2 + 2 + 1 + 2
    assert "And 1 more images, less certain than these" in page
    assert "None was found." in page  # of repeated images
    assert "16.67%" in page and "1.5" in page  # of the images doubted, minutes


def test_a_pair_of_classes_stands_side_by_side_with_names_under_the_pictures(page: str) -> None:
    card = articles(page)[0]
    assert "name0 and name1" in card and "97.50% sure" in card and "component 7" in card
    assert card.count("<img") == 2 * EACH
    assert re.findall(r"<figcaption[^>]*>(.*?)</figcaption>", card)[:2] == ["t0", "t6"]


def test_a_mixed_class_is_one_card_with_its_parts(page: str) -> None:
    card = articles(page)[1]
    assert card.index("Stays") < card.index("Further part")
    captions = re.findall(r"<figcaption[^>]*>(.*?)</figcaption>", card)
    assert captions == ["t14", "t20", "t26", "t2", "t8"]
    assert "3 images" in card and "2 images" in card


def test_a_stray_has_its_class_and_the_other_one_beside_it_without_doubted_images(
    page: str,
) -> None:
    card = articles(page)[3]
    captions = re.findall(r"<figcaption[^>]*>(.*?)</figcaption>", card)
    assert captions[0] == "t4" and "Its class: name4" in card and "Goes to: name5" in card
    assert captions[1:3] == ["t22", "t28"]  # t10 and t16 are doubted, too
    assert captions[-4:] == ["t5", "t11", "t23", "t29"]


def test_a_leak_shows_the_image_of_the_evaluation_set_and_escapes_names(page: str) -> None:
    card = articles(page)[6]
    captions = re.findall(r"<figcaption[^>]*>(.*?)</figcaption>", card)
    assert captions == ["t11", "h1"]
    assert ">held</p>" in card and "t&lt;b&gt;" in card and "t<b>" not in page


def test_a_set_whose_path_is_not_utf8_has_its_pictures_too(
    tmp_path: Path, index: ShardIndex, heldout: ShardIndex
) -> None:
    """The findings spell out its bytes, and the page looked for the picture by the name itself."""
    name = str(tmp_path / "h\udcff")
    shutil.copytree(heldout.folder, name)
    leak = finding("leak", key="t", sample=1, neighbour_sample=1, neighbour_set=spell_out(name))
    pq.write_table(
        pa.Table.from_pylist([leak], pa.schema(SCHEMA.items())), tmp_path / "findings.parquet"
    )
    (tmp_path / "figures.json").write_text(json.dumps(FIGURES))
    write_audit_page(str(tmp_path), index, None, {name: name})
    (card,) = articles((tmp_path / "audit.html").read_text())
    assert re.findall(r"<img.*?<figcaption[^>]*>(.*?)</figcaption>", card) == ["t1", "h1"]


def test_the_threshold_is_drawn_into_the_histogram(page: str) -> None:
    chart = re.search(r'<svg class="chart".*?</svg>', page, re.DOTALL)
    assert chart and "threshold 0.25" in chart.group()
    assert re.findall(r'class="bar (c\d)"', chart.group()) == ["c0", "c0", "c1"]
    assert "0.25 to 0.5: 3 images" in chart.group()
    assert "99.50%" in page and "0.2" in page and "Score: margin" in page


def test_a_kind_that_changes_no_label_says_so(page: str) -> None:
    sections = re.findall(r"<section.*?</section>", page, re.DOTALL)
    changed = {s.split('"')[1]: "not changed by these" not in s for s in sections}
    assert changed == dict.fromkeys(KINDS, True) | {"wrong_label": False, "leak": False}


def test_what_is_downloaded_has_the_columns_of_the_table_and_all_rows_of_a_decision(
    page: str,
) -> None:
    found = re.search(r'id="rows">(.*?)</script>', page, re.DOTALL)
    assert found
    content = json.loads(found.group(1))
    assert content["columns"] == list(SCHEMA)
    assert [len(rows) for rows in content["rows"]] == [1, 2, 1, 1, 1, 1, 1, 1]
    assert content["rows"][1][1][:4] == ["mixed_class", "t8", "8", "2"]


class Tags(html.parser.HTMLParser):
    """Collects what a page would fetch, and tags that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.urls += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Open and closed at once."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_fetches_nothing_and_closes_what_it_opens(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert all(url.startswith(("data:", "#")) for url in tags.urls)
    assert "http" not in re.sub(r"data:image[^\"]*", "", page)


def test_classes_are_looked_up_in_the_label_set_that_was_audited(
    index: ShardIndex, tmp_path: Path
) -> None:
    lists = [[0] if n < 20 else [1] if n < 29 else [] for n in range(index.samples)]
    labels = write_labels(str(tmp_path / "labels"), index, lists, 2)
    members = ClassMembers(index, labels, [0, 1, -1], np.array([0, 1]), 64)
    assert members.sizes[0] == 20 and members.sizes[1] == 9
    assert members.of(0, 3) == [2, 10, 19]  # evenly, and without doubted ones
    assert members.of(1, 100) == list(range(20, 29))


def test_a_folder_without_findings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no findings of an audit"):
        read_findings(str(tmp_path), 3)
