"""What would make an evaluation fail is said before a run, not at its end."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mhe_dist.config.data import DataConfig
from mhe_dist.config.schema import EvaluateConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError, UserError
from pipelines.evaluate.in_training import evaluate_in_training, figure_names, refuse_unusable_sets
from pipelines.shards.writer import Sample, ShardWriter
from tests.support import tiny
from tests.support.data.images import encoded

FONTS = {"fonts": ["Song.ttf", "Brush.ttf"], "font": [0] * 24}


def write_set(folder: Path, labels: list[int], meta: dict[str, Any] | None = None) -> str:
    data = encoded(np.zeros((4, 4, 3), np.uint8), "png")
    with ShardWriter(str(folder), "heldout") as writer:
        writer.write(
            [
                Sample(f"{number:03d}", {"png": data, "cls": str(label).encode()})
                for number, label in enumerate(labels)
            ]
        )
        writer.finish(max(labels) + 1, meta)
    return str(folder)


def refuse(**settings: Any) -> None:
    data = DataConfig(shards="unused", image_size=16)
    refuse_unusable_sets(EvaluateConfig.model_validate(settings), data, 0, Topology(), 30)


TWELVE_PAIRS = [number // 2 for number in range(24)]


@pytest.mark.parametrize(
    ("labels", "meta", "settings", "message"),
    [
        (range(12), {}, {}, r"evaluate\.shards=.*12 gallery entries, 0 probes: no class has two"),
        ([0] * 12, {}, {}, r"12 images of 1 classes make 0 pairs .* too few for 10 folds"),
        (range(12), {"gallery": [1, 2, 3]}, {}, r"no probe is of a class that is enrolled"),
        (TWELVE_PAIRS, FONTS, {"typefaces": {"hard": "Brush*"}}, r"typefaces\.hard=Brush\*: no pr"),
        (TWELVE_PAIRS, {}, {"typefaces": {"hard": "Brush*"}}, r"only sets of `mhe data glyphs`"),
    ],
)
def test_a_set_without_what_is_to_be_counted_is_refused(
    labels: Any, meta: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_set(tmp_path / "set", list(labels), meta)
    with pytest.raises(UserError, match=message):
        refuse(shards=folder, **settings)


def test_a_usable_set_is_taken(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", TWELVE_PAIRS, FONTS)
    for settings in (
        {"shards": folder, "typefaces": {"easy": "Song*"}},
        {"verification": [tiny.write_bin(tmp_path / "lfw.bin")]},
        {},
    ):
        assert refuse(**settings) is None


def test_figures_are_known_by_name_before_there_are_any(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", TWELVE_PAIRS, FONTS)
    lfw = tiny.write_bin(tmp_path / "lfw.bin")
    settings = EvaluateConfig(shards=folder, verification=[lfw], typefaces={"easy": "Song*"})
    data = DataConfig(shards="unused", image_size=16)

    def embed(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float() + torch.arange(768)

    found = evaluate_in_training(embed, settings, data, 0, Topology())
    assert set(found.metrics) == set(figure_names(settings))
    assert figure_names(EvaluateConfig()) == []


def test_a_damaged_verification_set_is_refused(tmp_path: Path) -> None:
    path = Path(tiny.write_bin(tmp_path / "lfw.bin"))
    images, same = pickle.loads(path.read_bytes())
    images[41] = images[41][:300]
    path.write_bytes(pickle.dumps((images, same)))
    with pytest.raises(RunError, match=r"lfw\.bin: image 41 cannot be decoded"):
        refuse(verification=[str(path)])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"lfw\.bin: not an InsightFace verification set"):
        refuse(verification=[str(path)])
