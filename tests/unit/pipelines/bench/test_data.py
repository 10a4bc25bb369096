"""`mhe bench data` measures what it says: every reader reads every image."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhe_dist.errors import UserError
from pipelines.bench.data import measure_loaders
from pipelines.shards.index import ShardIndex
from pipelines.shards.writer import Sample, ShardWriter
from tests.support import tiny


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return ShardIndex.load(tiny.write_shards(tmp_path_factory.mktemp("data") / "set", classes=90))


@pytest.mark.slow
def test_all_read_the_same_images_and_ratios_are_reported(index: ShardIndex) -> None:
    result = measure_loaders(index, workers=1, repeats=1)
    images = {name: timing.images for name, timing in result.timings.items()}
    assert images["bare"] == images["decoder"] == images["webdataset"] == index.samples == 1080
    assert images["mhe"] == 1024  # whole steps of 512
    assert all(0 < t.worker[0] <= t.cpu[0] for t in result.timings.values())
    written = result.to_dict()
    assert written["setting"]["side"] == tiny.SIDE
    rate = {name: result.timings[name].rate("wall") for name in images}
    assert written["ratios"]["bare"]["per worker"] == pytest.approx(rate["mhe"] / rate["bare"])


def test_images_that_the_others_do_not_read_are_refused(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "set"), "part") as writer:
        writer.write(Sample(f"{n}", {"png": b"", "cls": b"0"}) for n in range(200))
        made = writer.finish(1)
    with pytest.raises(UserError, match=r"no \.jpg"):
        measure_loaders(made, workers=1, repeats=1)
    few = ShardIndex(made.folder, 1, [])
    with pytest.raises(UserError, match="too few"):
        measure_loaders(few, workers=1, repeats=1)
