"""`mhe evaluate ... --workers`: the files hold the same bytes as those of one process."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launcher import cli
from launcher.verbs.evaluate import shared
from pipelines.embedding import worker_embed
from pipelines.evaluate.metrics import bootstrap
from pipelines.storage.worker_pool import Workers
from tests.support import tiny
from tests.support.data.ijb_set import write_ijb_set


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a run whose held-out set is there: 360 images in four shards."""
    folder = tmp_path_factory.mktemp("runs")
    shards = tiny.write_shards(folder / "heldout", first=10_000)
    return tiny.trained_run(folder, shards, evaluate={"shards": shards}).run.path


class Elsewhere:
    """Workers that know a task by its bytes alone, and take tasks in another order."""

    def map_unordered(
        self, function: Callable[[Any], Any], tasks: Iterable[tuple[int, Any]]
    ) -> Generator[tuple[int, Any]]:
        """See `Workers.map_unordered`."""
        sent = [(number, pickle.dumps(task)) for number, task in tasks]
        random.Random(3).shuffle(sent)
        for number, task in sent:
            yield number, pickle.loads(pickle.dumps(function(pickle.loads(task))))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers are tasks of one block of images each, in this process."""

    @contextmanager
    def _choose(count: int, gpu: bool, address: str) -> Iterator[Workers]:
        assert (count, gpu, address) == (2, False, "")
        yield Elsewhere()

    monkeypatch.setattr(shared, "choose_workers", _choose)
    monkeypatch.setattr(worker_embed, "_BLOCKS", 1)
    monkeypatch.setattr(bootstrap, "DRAWS", 5)


def photos(root: Path) -> str:
    rng = np.random.default_rng(0)
    for name in "abcd":
        (root / name).mkdir(parents=True)
        for number in range(40):
            pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02d}.png")
    return str(root)


def saved(run: str, words: list[str], name: str) -> bytes:
    file = Path(run, "evaluation", name)
    file.unlink(missing_ok=True)
    assert cli.run(["evaluate", words[0], run, *words[1:]]) == 0
    return file.read_bytes()


VERBS = {
    "heldout": lambda folder: ["heldout"],
    "verification": lambda folder: ["verification", tiny.write_bin(folder / "lfw.bin")],
    "ijbc": lambda folder: ["ijb", "--root", str(write_ijb_set(folder / "IJBC"))],
    "identification": lambda folder: [
        *("identification", "--images", photos(folder / "photos"), "--all-pairs", "--flip")
    ],
    "probe": lambda folder: ["probe", "--images", photos(folder / "photos")],
}


@pytest.mark.parametrize("name", VERBS)
def test_what_workers_find_is_what_one_process_finds(
    run: str, name: str, tmp_path: Path, elsewhere: None
) -> None:
    words = VERBS[name](tmp_path)
    here = saved(run, words, f"{name}.json")
    assert saved(run, [*words, "--workers", "2"], f"{name}.json") == here
    assert not list(Path(run).glob(".compared-*"))


@pytest.mark.slow
def test_processes_compare_rows_of_a_folder(run: str, tmp_path: Path) -> None:
    shards, rows = str(Path(run).parent / "heldout"), str(tmp_path / "rows")
    assert cli.run(["embed", run, "--images", shards, "--out", rows, "--workers", "1"]) == 0
    words = ["identification", "--images", rows, "--all-pairs"]
    here = saved(run, words, "identification.json")
    assert saved(run, [*words, "--workers", "2"], "identification.json") == here
    assert not list(Path(rows).glob(".comp*")), "what is finished is of no use any more"


def test_torchrun_and_workers_do_not_mix(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.run(["evaluate", "heldout", run, "--workers", "2"]) == 2
    assert "not under torchrun" in " ".join(capsys.readouterr().err.split())
