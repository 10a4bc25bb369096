"""`mhe cluster`: from shards without labels to a label set, its report, what to type next."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launcher import cli
from launcher.verbs.embedding import cluster, shared
from mhe_dist.config.write import save_config
from pipelines.data.mixture.index import open_training_index
from pipelines.embedding.folder import EmbeddingsFolder
from pipelines.runs.trained import load_trained_backbone
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import LabelSet
from pipelines.storage.worker_pool import HERE
from tests.support import tiny
from tests.support.files import contents
from tests.support.terminal import said

Captured = pytest.CaptureFixture[str]
IMAGES = tiny.CLASSES * tiny.IMAGES


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and a YAML file of a run that nobody trained."""
    folder = tmp_path_factory.mktemp("data")
    shards = tiny.write_shards(folder / "shards")
    save_config(tiny.config(folder, shards), f"{folder}/small.yaml")
    return folder


def command(data: Path, out: Path, *more: str) -> list[str]:
    words = ["cluster", f"{data}/shards", "--out", str(out), "--workers", "1"]
    return [*words, "--classes", "30", *more]


@pytest.fixture(scope="module")
def made(data: Path) -> Path:
    """A label set by the untrained backbone; this process embeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "choose_workers", lambda *_: nullcontext(HERE))
        assert cli.run(command(data, data / "first", "--model", f"{data}/small.yaml")) == 0
    return data / "first"


def test_a_yaml_file_embeds_with_the_backbone_that_it_begins_with(data: Path, made: Path) -> None:
    backbone = load_trained_backbone(f"{data}/first-model")
    assert backbone.step == 0
    rows = EmbeddingsFolder.open(f"{made}-embeddings").rows
    assert rows.shape == (IMAGES, 32)
    labels = LabelSet.load(str(made))
    assert labels.samples == IMAGES and labels.labelled == IMAGES
    assert labels.meta["settings"]["classes"] == 30
    assert labels.meta["embeddings"]["dim"] == 32
    assert labels.meta["figures"]["true_classes"] == tiny.CLASSES
    assert labels.meta["figures"]["purity"] > 3 / tiny.CLASSES  # the weights are random


def test_a_checkpoint_is_named_as_a_run_is(made: Path) -> None:
    step = f"{made}-model/checkpoints/step_00000000"
    assert shared.find_model(f"{step}/", "", "") == step


def test_the_report_shows_sizes_and_classes(made: Path) -> None:
    report = made / "report"
    names = {path.name for path in report.iterdir()}
    sheets = {f"{name}.png" for name in ("random", "largest", "loosest")}
    assert names == {"figures.json", "sizes.png", *sheets}
    figures = json.loads((report / "figures.json").read_text())
    assert figures == LabelSet.load(str(made)).meta["figures"]
    for name in sheets:
        pixels = np.asarray(Image.open(report / name).convert("RGB"))
        assert pixels.shape[0] > 10 * 112
        assert pixels.std(axis=2).mean() > 10  # images: blanks, frames and letters are grey


def test_it_says_what_it_takes_what_it_made_and_what_comes_next(
    data: Path, made: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "again"
    text = said(command(data, out, "--embeddings", f"{made}-embeddings"), capsys)
    assert "together, at most about" in text and "GiB" in text and "MiB until the end" in text
    assert f"{IMAGES} of {IMAGES} images have classes, of " in text
    assert "purity against the 30 labels" in text
    assert f"mhe train CONFIG data.shards={data}/shards data.labels={out}" in text
    assert contents(out) == contents(made)
    shown = said(["data", "labels", "show", str(out)], capsys)
    assert "made_by: mhe cluster" in shown


def test_a_label_set_that_was_clustered_can_be_trained_on(made: Path) -> None:
    labels = LabelSet.load(str(made))
    config = tiny.config(
        made.parent,
        f"{made.parent}/shards",
        data={"labels": str(made), "labels_per_sample": labels.max_labels},
        head={"mhs": {"length": 4, "exchange": "gather"}},
    )
    index = open_training_index(config.data, config.run.seed)
    assert index.num_classes == labels.num_classes and index.samples == IMAGES
    assert index.label_shape == (labels.max_labels,)


def test_embeddings_of_other_shards_are_refused(
    made: Path, tmp_path: Path, capsys: Captured
) -> None:
    """As many images in another order: every image got the class of another one."""
    others = tiny.write_shards(tmp_path / "shards", first=1)
    assert ShardIndex.load(others).samples == IMAGES
    words = command(tmp_path, tmp_path / "set", "--embeddings", f"{made}-embeddings")
    assert f"whose images are not those of {others} in their order" in said(words, capsys, 2)
    assert not (tmp_path / "set").exists()


def test_mistakes_say_what_to_type(
    data: Path, made: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    assert "--model is missing" in said(command(data, out), capsys, 2)
    assert "--model nothing: no YAML file, and no run at nothing" in said(
        command(data, out, "--model", "nothing"), capsys, 2
    )
    many = [*command(data, out, "--model", f"{data}/small.yaml"), "--classes", "9999"]
    assert "--classes 9999: there are 360 images" in said(many, capsys, 2)
    monkeypatch.setattr(cluster, "_free_memory", lambda: 1 << 20)
    words = command(data, out, "--embeddings", f"{made}-embeddings")
    assert "GiB of memory are needed and 0.0 are free" in said(words, capsys, 2)
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "make room, or name another folder" in said(words, capsys, 2)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    assert "already exists" in said(command(data, made, "--model", "x"), capsys, 2)
