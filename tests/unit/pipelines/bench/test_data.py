"""`mhe bench data` measures what it says: every contestant reads every image."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhe_dist.errors import UserError
from pipelines.bench import data
from pipelines.shards.index import ShardIndex
from pipelines.shards.writer import Sample, ShardWriter
from tests import tiny


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return ShardIndex.load(tiny.write_shards(tmp_path_factory.mktemp("data") / "set", classes=90))


def test_all_read_the_same_images_and_ratios_are_told(index: ShardIndex) -> None:
    result = data.measure(index, workers=1, repeats=1)
    images = {name: timing.images for name, timing in result.timings.items()}
    assert images["bare"] == images["decoder"] == images["webdataset"] == index.samples == 1080
    assert images["mhe"] == 1024  # whole steps of 512
    assert all(0 < t.worker[0] <= t.cpu[0] for t in result.timings.values())
    told = result.to_dict()
    assert told["setting"]["side"] == tiny.SIDE
    rate = {name: result.timings[name].rate("wall") for name in images}
    assert told["ratios"]["bare"]["per worker"] == pytest.approx(rate["mhe"] / rate["bare"])


def test_images_that_the_others_do_not_read_are_refused(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "set"), "part") as writer:
        writer.write(Sample(f"{n}", {"png": b"", "cls": b"0"}) for n in range(200))
        made = writer.finish(1)
    with pytest.raises(UserError, match=r"no \.jpg"):
        data.measure(made, workers=1, repeats=1)
    few = ShardIndex(made.folder, 1, [])
    with pytest.raises(UserError, match="too few"):
        data.measure(few, workers=1, repeats=1)
