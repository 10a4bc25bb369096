"""Names that shells, URLs, patterns and UTF-8 give a meaning, or none: data and runs bear them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from mhe_dist.checkpoint.store import Checkpoint
from pipelines.data.verify import verify_dataset
from pipelines.pretrain.main import run_pretraining
from pipelines.report.html import write_run_page
from pipelines.runs.folder import find_checkpoint_folder, newest_checkpoint
from pipelines.sources.webdataset import expand_tars, index_shards
from pipelines.storage.staging import Journal
from tests.support import tiny
from tests.support.data.images import encoded
from tests.support.data.tars import add_members

ODD = "a b%20c?d#e'ü\"[x]*&$(q);{}"
NOT_UTF8 = b"\xff\xfe".decode(errors="surrogateescape")


def write_tar(path: Path, samples: int = 16) -> None:
    """A tar of images of two classes, whose names are not UTF-8."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(samples):
            pixels = rng.integers(0, 256, (tiny.SIDE, tiny.SIDE, 3), np.uint8)
            content = {"png": encoded(pixels, "png"), "cls": str(number % 2).encode()}
            if number == 5:
                content["png"] = b"no image"
            key = f"{NOT_UTF8}{number:03d}"
            add_members(tar, ((f"{key}.{extension}", data) for extension, data in content.items()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("odd") / ODD
    (found / "data").mkdir(parents=True)
    write_tar(found / "data" / f"{NOT_UTF8}[1].tar")
    return found


@pytest.mark.slow
def test_data_with_odd_names_are_indexed_verified_and_trained(folder: Path) -> None:
    data = str(folder / "data")
    made = index_shards([data])
    assert made.index.samples == 16
    report = verify_dataset(made.index, Journal(str(folder / "journal"), {}))
    assert report.counts == {"image": 1}, report.problems
    config = tiny.config(
        folder / "runs",
        data,
        data={"streams": 8, "shuffle_window": 2, "max_bad_fraction": 0.5},
        head={"kind": "full", "groups": 1},
        train={"max_steps": 2, "global_batch": 8, "micro_batch": 8},
    )
    summary = run_pretraining(config)
    assert summary["bad_samples"] == 1
    assert len(tiny.per_step(config)[0]) == 2
    newest = newest_checkpoint(config.run.path)
    assert newest is not None and newest.endswith("step_00000002")
    assert find_checkpoint_folder(config.run.path) == newest
    assert Checkpoint(newest, 2).run["step"] == 2
    sections = write_run_page(config.run.path, f"{config.run.path}/report.html")
    assert "Bad samples" in sections


def test_a_folder_is_no_pattern(folder: Path) -> None:
    (tar,) = expand_tars([str(folder / "data")])
    assert tar.endswith("[1].tar")
    assert expand_tars([tar]) == [tar]
