"""The documentation site, without building it: every page has its place, the API page is whole."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import cli
from mhe_dist.config.describe import all_keys
from tests.support.project_file import PROJECT
from tools import site_pages
from tools.site_verbs import verbs_page

ROOT = Path(__file__).parents[2]
SITE: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def test_every_page_has_its_place() -> None:
    placed = [name for _, name in site_pages.walk_nav(SITE["nav"])]
    there = {path.name for path in ROOT.glob("docs/*.md")} | site_pages.pages().keys()
    assert sorted(placed) == sorted(there)


def test_the_build_is_strict_and_prints_its_warnings() -> None:
    """With --quiet, MkDocs 1.6 counts no warning, and a strict build passes with broken links."""
    (command,) = re.findall(r"mkdocs build.*", (ROOT / "Makefile").read_text())
    assert command == "mkdocs build --strict"
    assert set(SITE["validation"]["links"].values()) == {"warn"}
    assert SITE["validation"]["links"].keys() >= {"not_found", "anchors"}


def test_ci_builds_the_site_and_installs_what_is_pinned() -> None:
    assert "make docs" in (ROOT / ".ci" / "run").read_text().splitlines()
    pinned = (ROOT / "constraints.txt").read_text()
    for requirement in PROJECT["optional-dependencies"]["docs"]:
        name = re.split(r"[\[<>=]", requirement)[0]
        assert re.search(rf"^{name}==", pinned, re.MULTILINE), name


def test_every_section_of_the_readme_is_on_one_page() -> None:
    found = site_pages.sections((ROOT / "README.md").read_text())
    used = [name for names in site_pages.README_PAGES.values() for name in names]
    assert sorted(used) == sorted(found)


def test_pages_of_the_root_link_to_pages_of_the_site() -> None:
    there = {path.name for path in ROOT.glob("docs/*")} | site_pages.pages().keys()
    for name, text in site_pages.pages().items():
        assert text.startswith("# "), name
        assert {link for _, link in site_pages.LINK.findall(text)} <= there, name


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("docs/data.md#glyphs", "data.md#glyphs"),
        ("README.md#installing", "install.md"),
        ("README.md#how-it-works", "index.md#how-it-works"),
        ("configs/quickstart.yaml", "recipes.md#quickstart"),
        ("CHANGELOG.md", "changelog.md"),
    ],
)
def test_a_link_leads_to_the_page_that_holds_its_file(link: str, target: str) -> None:
    assert site_pages.link_target(link) == target


def test_a_link_that_is_called_by_its_file_is_called_by_its_page() -> None:
    config = {"nav": SITE["nav"]}
    text = "[docs/data.md](data.md#glyphs), [faq.md](faq.md), [a set](data.md), ![x](head.png)"
    assert site_pages.on_page_markdown(text, None, config, None) == (
        "[Data](data.md#glyphs), [Questions](faq.md), [a set](data.md), ![x](head.png)"
    )


def test_a_link_to_no_section_of_the_readme_is_an_error() -> None:
    with pytest.raises(ValueError, match="no such section"):
        site_pages.link_target("README.md#nowhere")


def test_every_config_is_a_recipe() -> None:
    found = re.findall(r"^## (\w+)$", site_pages.recipes_page(), re.MULTILINE)
    assert found == sorted(path.stem for path in ROOT.glob("configs/*.yaml"))


def test_every_key_of_the_config_is_a_setting_once() -> None:
    listed = re.findall(r"^\| `([\w.]+)` \|", site_pages.settings_page(), re.MULTILINE)
    keys = [key.path for key in all_keys() if key.section is None]
    assert sorted(listed) == sorted(keys)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("optim.lr", "| number > 0 | `0.1` | Peak learning rate. |"),
        ("head.kind", "`full`, `partial_fc`, `mhs`, `mhp`, `mhc`"),
        ("data.shards", "string"),
        ("head.mhs.correction", "true or false"),
    ],
)
def test_a_setting_says_what_it_may_hold(key: str, says: str) -> None:
    (row,) = re.findall(rf"^\| `{re.escape(key)}` .*$", site_pages.settings_page(), re.MULTILINE)
    assert says in row


def test_every_verb_has_a_section_with_its_options_and_examples() -> None:
    page = verbs_page()
    headings = re.findall(r"^##+ mhe (.+)$", page, re.MULTILINE)
    assert [name for name in headings if " " not in name] == list(cli.VERBS)
    assert {"data folder", "data labels diff", "evaluate ijb", "k8s render"} <= set(headings)
    train = page.partition("## mhe train\n")[2].partition("\n## ")[0]
    assert "    mhe train quickstart run.name=wide" in train
    assert "| `CONFIG` | (required) | YAML file of the run" in train
    assert "| `--trial, --no-trial` | `--trial` |" in page
    assert "| `--to` | `timm`, `onnx` |" in page
    assert "--help" not in page.replace("`mhe VERB --help`", "")


@pytest.mark.parametrize("door", ["mhe_dist", "pipelines", "launcher"])
def test_the_api_page_has_every_name_of_a_door(door: str) -> None:
    """Once on the page: launcher's errors that mhe_dist has as well stand there."""
    sections = site_pages.sections((ROOT / "docs" / "api.md").read_text())
    listed = re.findall(r"^::: ([\w.]+)$", sections[door], re.MULTILINE)
    names = {name.rpartition(".")[2] for name in listed}
    elsewhere = {"RunError", "UserError"} if door == "launcher" else set()
    modules = import_module(door)._MODULES
    assert names == modules.keys() - elsewhere
    assert sorted(listed) == sorted(f"{modules[name]}.{name}" for name in names)


def test_what_the_network_would_be_needed_for_is_found() -> None:
    tags = [
        '<script src="https://unpkg.com/x"></script>',
        '<link rel="stylesheet" href="//fonts.googleapis.com/css">',
        '<img alt="x" src="http://host/a.png">',
    ]
    here = '<a href="https://arxiv.org">x</a><img src="head.png"><script src="a.js"></script>'
    assert len(site_pages.loaded_from_elsewhere(here + "".join(tags))) == 3
    assert not site_pages.loaded_from_elsewhere(here)
