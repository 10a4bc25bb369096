"""The pages of docs/: what the code cites is there, links lead somewhere, the rooms are named."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

import mhe_dist
import pipelines
from launcher.reproduce.studies import STUDIES
from tests.support.project_file import PROJECT
from tests.unit.test_architecture import ROOMS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
CODE = sorted(
    p for f in ("mhe_dist", "pipelines", "launcher", "tests") for p in ROOT.glob(f"{f}/**/*.py")
)
CITATION = re.compile(r"docs/(?P<page>\w+)\.md(?:\s+section\s+(?P<section>\d+))?")
# Pages that are not part of the repository.
ELSEWHERE = re.compile(r"\b(?:DESIGN|FORMATS|FACTS|PAPER|HOUSE)(?:\.md\b|,? section \d)")
FILE = re.compile(r"`((?:configs|docs|launcher|mhe_dist|pipelines|tests|tools)/[\w./-]+)`")
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


# Rooms that write data sets, checkpoints and runs, and how they name their files.
WRITERS = ("shards", "storage", "runs", "data", "embedding", "checkpoint")
WRITTEN = re.compile(r'^_?[A-Z_]+(?:: Final)? = "([a-z_.]+\.(?:json|jsonl|tsv|npy|lock))"', re.M)


def citations() -> set[tuple[str, str]]:
    texts = [path.read_text() for path in [*CODE, *PAGES]]
    return {(m["page"], m["section"] or "") for text in texts for m in CITATION.finditer(text)}


@pytest.mark.parametrize(("page", "section"), sorted(citations()))
def test_a_cited_section_exists(page: str, section: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert not section or re.search(rf"^## {section}\. ", text, re.MULTILINE)


def test_nothing_cites_pages_that_are_not_in_the_repository() -> None:
    here = Path(__file__)
    assert not [str(p) for p in [*CODE, *PAGES] if p != here and ELSEWHERE.search(p.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    missing = [name for name in FILE.findall(page.read_text()) if not (ROOT / name).exists()]
    assert not missing


def test_the_page_of_formats_names_what_is_written() -> None:
    texts = [path.read_text() for path in CODE if path.parts[-2] in WRITERS]
    names = {name for text in texts for name in WRITTEN.findall(text)}
    assert {"index.json", "manifest.json", "ended.json"} <= names
    page = (ROOT / "docs" / "formats.md").read_text()
    assert sorted(name for name in names if f"`{name}`" not in page) == []


def test_a_ray_that_a_page_starts_reports_nothing_to_its_makers() -> None:
    """Nodes that join do not report: their head would."""
    text = "\n".join(path.read_text().replace("\\\n", "") for path in PAGES)
    starts = re.findall(r"ray start (?=.*--head).*|ray symmetric-run .*", text)
    assert len(starts) >= 4  # README, docs/clusters.md
    assert not [line for line in starts if "--disable-usage-stats" not in line]


@pytest.mark.parametrize("floor", ["mhe_dist", "pipelines"])
def test_the_design_names_every_room(floor: str) -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    missing = [room for room in ROOMS[floor] if not re.search(rf"`{room}/?`", text)]
    assert not missing


def test_the_list_of_where_to_change_what_has_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    folders = [path.parent for path in ROOT.glob("*/*/__init__.py")]
    rooms = [f for f in folders if f.parent.name in ("launcher", "pipelines", "mhe_dist")]
    assert len(rooms) > 25
    assert not [room.name for room in rooms if not re.search(rf"\b{room.name}/", text)]


def test_the_page_of_evaluation_lists_every_study() -> None:
    """Four of ten were missing."""
    text = (ROOT / "docs" / "evaluation.md").read_text()
    assert re.findall(r"^    mhe reproduce (\w+) +#", text, re.MULTILINE) == list(STUDIES)


def test_the_readme_tells_the_extras_apart() -> None:
    extras = PROJECT["optional-dependencies"]
    table = re.findall(r"^\| `(\w+)` \| ([\w-]+)", (ROOT / "README.md").read_text(), re.M)
    listed = {name: package for name, package in table if name in extras}
    assert listed.keys() == extras.keys()
    for name, package in listed.items():
        assert any(re.match(rf"{package}\b", each) for each in extras[name])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_that_a_page_names_are_in_the_makefile(page: Path) -> None:
    named = set(re.findall(r"(?:^ {4}|`)make ([\w-]+)", page.read_text(), re.M))
    assert named <= TARGETS


def test_the_release_checklist_names_what_there_is() -> None:
    text = (ROOT / "docs" / "releasing.md").read_text()
    named = set(re.findall(r"`make ([\w-]+)`", text))
    assert named and named <= TARGETS
    assert metadata.version("mhe") == PROJECT["version"]


def test_the_python_of_the_readme_uses_names_of_the_door() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    used = re.findall(r"\b(mhe_dist|pipelines)\.(\w+)", block)
    door = {"mhe_dist": mhe_dist.__all__, "pipelines": pipelines.__all__}
    assert used and not [name for package, name in used if name not in door[package]]
