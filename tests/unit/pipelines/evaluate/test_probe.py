"""Probes of embeddings: k-NN and a linear classifier."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from pipelines.evaluate.probe import probe_embeddings, probe_images, split_by_class
from tests.support import tiny


def test_probes_tell_a_good_embedding_from_a_bad_one() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 300)
    centres = rng.standard_normal((5, 16))
    good = (centres[labels] + 0.3 * rng.standard_normal((300, 16))).astype(np.float32)
    bad = rng.standard_normal((300, 16)).astype(np.float32)
    train, test = split_by_class(labels)
    assert len(test) == 60
    assert sorted([*train, *test]) == list(range(300))
    found = probe_embeddings(good[train], labels[train], good[test], labels[test], k=500)
    assert found["knn"] < 0.5  # all neighbours vote: the majority
    found = probe_embeddings(good[train], labels[train], good[test], labels[test], k=5)
    assert min(found["knn"], found["linear"]) > 0.95
    blind = probe_embeddings(bad[train], labels[train], bad[test], labels[test], k=5)
    assert max(blind["knn"], blind["linear"]) < 0.45
    assert found["majority"] == blind["majority"] < 0.3
    with pytest.raises(UserError, match="one class"):
        probe_embeddings(good, np.zeros(300, int), good, labels)
    with pytest.raises(UserError, match="cannot be split"):
        split_by_class(np.arange(10))


def test_the_nearest_neighbours_vote_by_the_cosine() -> None:
    """Lengths do not matter: 2 of the 3 nearest directions are of class 1."""
    train = np.array([[9, 0], [0.1, 0.02], [0.1, 0.03], [0, 5]], np.float32)
    found = probe_embeddings(
        train, np.array([0, 1, 1, 0]), np.array([[3, 0.1]], np.float32), np.array([1]), 3
    )
    assert found["knn"] == 1.0


COLOURS = {"blue": (0, 0, 250), "green": (0, 250, 0), "red": (250, 0, 0)}


def mean_colour(images: Tensor) -> Tensor:
    return images.float().mean(dim=(2, 3))


def photos(folder: Path, **classes: str) -> str:
    """Four images of a colour in the folder of each class."""
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(4):
            image = Image.new("RGB", (8, 8), COLOURS[colour])
            image.save(folder / name / f"{number}.png")
    return str(folder)


@pytest.mark.parametrize("few", [("green", "red"), ("red",)])
def test_classes_of_a_second_folder_are_those_of_the_first_by_their_names(
    few: tuple[str, ...], tmp_path: Path
) -> None:
    train = photos(tmp_path / "train", blue="blue", green="green", red="red")
    test = photos(tmp_path / "test", **{name: name for name in few})
    found = probe_images(mean_colour, train, test, Topology(), 8, k=3)
    assert found is not None and found["knn"] == found["linear"] == 1.0
    photos(tmp_path / "test", grey="blue")
    with pytest.raises(UserError, match=f"--test {test}: its class 'grey' is none of {train}"):
        probe_images(mean_colour, train, test, Topology(), 8, k=3)


def test_classes_of_shards_are_named_by_their_table_or_their_numbers(tmp_path: Path) -> None:
    train = tiny.write_shards(tmp_path / "train", classes=4)
    test = tiny.write_shards(tmp_path / "test", classes=3)
    found = probe_images(mean_colour, train, test, Topology(), tiny.SIDE, k=3)
    assert found is not None and found["knn"] > found["majority"]
