"""The page of a run: everything that the records hold, whole in one file, nothing runs in it."""

from __future__ import annotations

import base64
import errno
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from mhe_dist.config.write import save_config
from pipelines.report.evaluation import save_evaluation
from pipelines.report.html import write_run_page
from tests.support import tiny

NASTY = "<script>alert(1)</script>"


class Seen(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.places: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.places += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Records of a run that was interrupted once, with a bad sample and evaluations."""
    shards = tiny.write_shards(tmp_path / "heldout", classes=5)
    config = tiny.config(tmp_path, NASTY, evaluate={"shards": shards})
    save_config(config, f"{config.run.path}/config.yaml")
    folder = Path(config.run.path)
    records = [
        {"step": step, "time": 1.0 + step, "loss": 3 - 0.1 * step, "lr": 0.1, "images_per_s": 900.0}
        for step in range(12)
    ]
    records[5] |= {"restarts": 1.0, "restart_lost_steps": 4.0, "restart_seconds": 7.25}
    records[8] |= {"bad_samples": 1234.0}
    records[11] |= {"heldout/rank1": 0.25, "heldout/chance": 0.2, "heldout/lfw/accuracy": 0.997}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    bad = {"place": f"sample 3 of {NASTY}", "reason": "no image"}
    (folder / "bad_samples.jsonl").write_text(json.dumps(bad) + "\n")
    far = np.geomspace(1e-3, 0.1, 9)
    details = {"far": far, "tar": np.linspace(0.2, 0.9, 9)}
    details |= {"probes": np.arange(3), "nearest": np.arange(9).reshape(3, 3)}
    details["right"] = np.eye(3, dtype=bool)
    np.savez(folder / "evaluation.npz", **details)
    about = {"step": 12, "results": {"lfw": {"accuracy": 0.9971, "accuracy_interval": [0.99, 1.0]}}}
    save_evaluation(config.run.path, "verification", about, {"lfw": (far, details["tar"])}, "ROC")
    return config.run.path


@pytest.mark.slow
def test_everything_is_on_the_page_and_nothing_else_is_needed(run: str, tmp_path: Path) -> None:
    titles = write_run_page(run, str(tmp_path / "out" / "page.html"))
    wanted = ["Training", "Speed", "Unseen classes", "Nearest neighbours"]
    wanted += ["Nearest neighbours of mistakes"]
    wanted += ["Evaluation: verification", "Restarts", "Bad samples", "Settings"]
    assert titles == wanted
    content = (tmp_path / "out" / "page.html").read_text()
    seen = Seen()
    seen.feed(content)
    body, script = content.partition("<script>")[::2]
    assert "<script" not in body and "alert" not in script  # the page's own, the same for all runs
    assert "prefers-color-scheme: dark" in content
    assert "://" not in content.split("<body>")[0]
    assert content.count('<svg class="chart"') == 6
    pictures = [url for url in seen.places if url.startswith("data:image/jpeg;base64,")]
    assert len(pictures) == seen.tags.count("img") == 5 * 4  # probes with three entries each
    for url in pictures:
        assert base64.b64decode(url.partition(",")[2]).startswith(b"\xff\xd8")
    assert set(seen.places) - set(pictures) == {"data:,"}
    text = " ".join(seen.text.split())
    for part in (
        "25.00%",
        "99.70%",
        "900",
        "6 1 4 7.25",
        "1 samples could not be used",
        NASTY,
        "no image",
    ):
        assert part in text, part
    assert "They were drawn 1,234 times" in text
    assert "lfw accuracy 99.71% lfw accuracy_interval 99.00% to 100.00%" in text
    assert re.search(r"optim\.lr 0\.02", text)
    assert "under way or interrupted, 12 steps" in text


def test_figures_say_which_protocol_they_are_of(run: str, tmp_path: Path) -> None:
    summary = {"classes": 5, "samples": 60, "world_size": 1, "phases": {}, "exports": {}}
    summary |= {"device": "NVIDIA H200"}
    protocol = "enrolled: the first image of each class in the order of the shards"
    Path(run, "summary.json").write_text(json.dumps(summary | {"protocol": protocol}))
    results = {"step": 24, "results": {"protocol": "enrolled: by file name", "rank1": 0.9026}}
    save_evaluation(run, "identification", results, {}, "")
    write_run_page(run, str(tmp_path / "page.html"))
    seen = Seen()
    seen.feed((tmp_path / "page.html").read_text())
    text = " ".join(seen.text.split())
    assert "; complete, on NVIDIA H200 " in text
    assert f"the ROC of the last ({protocol})" in text
    assert "protocol enrolled: by file name rank1 90.26%" in text


def test_the_roc_of_an_earlier_version_is_shown_as_it_was_drawn(run: str, tmp_path: Path) -> None:
    path = Path(run, "evaluation", "verification.json")
    saved = json.loads(path.read_text())
    del saved["curves"]
    path.write_text(json.dumps(saved))
    write_run_page(run, str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png") == 1 and 'alt="ROC of verification"' in page


def test_a_file_that_cannot_be_read_is_not_left_out(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page was written as if the run had no settings and no summary."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", run)

    monkeypatch.setattr(LocalFileSystem, "info", refuse)
    monkeypatch.setattr(LocalFileSystem, "cat_file", refuse)
    with pytest.raises(PermissionError):
        write_run_page(run, str(tmp_path / "page.html"))


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, "unused")
    save_config(config, f"{config.run.path}/config.yaml")
    titles = write_run_page(config.run.path, str(tmp_path / "page.html"))
    assert titles == ["Restarts", "Bad samples", "Settings"]
    assert (tmp_path / "page.html").read_text().count("None is recorded.") == 2
