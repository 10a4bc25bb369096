"""Held-out evaluation over ranks: the same bits for any number of ranks."""

import numpy as np
import pytest
import torch

from mhe_dist.config.schema import Config
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from pipelines.embedding.embeddings import embed_set
from pipelines.evaluate.heldout import Evaluation, evaluate_heldout
from pipelines.shards.index import ShardIndex
from pipelines.shards.writer import Sample, ShardWriter
from tests.support.data.images import encoded

SIDE, CLASSES, PER_CLASS, BLOCK = 16, 11, 4, 8  # 44 images: 6 blocks, the last one half full


def write_set(folder, meta=None):
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (CLASSES, SIDE, SIDE, 3))
    with ShardWriter(folder, "heldout") as writer:
        for shard in range(2):
            samples = []
            for number in range(shard * 22, shard * 22 + 22):
                label = number // PER_CLASS
                noisy = patterns[label] + rng.normal(0, 25, (SIDE, SIDE, 3))
                data = encoded(noisy.clip(0, 255).astype(np.uint8), "png")
                members = {"png": data, "cls": str(label).encode()}
                samples.append(Sample(f"{number:03d}", members))
            writer.write(samples)
        writer.finish(CLASSES, meta)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(392, 12)
    )


class Embed:
    """Counts its calls and remembers their sizes."""

    def __init__(self):
        self.network, self.sizes = network(), []

    def __call__(self, images):
        self.sizes.append(len(images))
        with torch.no_grad():
            return self.network(images.float() / 255 - 0.5)


def config(folder, flip=False):
    values = {"shards": folder, "pairs": 60, "flip": flip}
    data = {"shards": "unused", "image_size": SIDE}
    return Config.model_validate({"data": data, "evaluate": values})


def evaluate(embed, config, topology) -> Evaluation:
    """Held-out evaluation with the settings of a config."""
    image_size, seed = config.data.image_size, config.run.seed
    return evaluate_heldout(embed, config.evaluate, image_size, seed, topology)


def embedded(topology, folder, empty):
    """(sizes of the calls, embeddings, labels, gallery), metrics and error of this rank."""
    embed = Embed()
    found = embed_set(embed, ShardIndex.load(folder), topology, SIDE, block=BLOCK)
    arrays = () if found is None else (found.embeddings, found.labels, found.gallery)
    rows = tuple(torch.from_numpy(part) for part in arrays)
    metrics = evaluate(Embed(), config(folder), topology).metrics
    try:
        evaluate(Embed(), config(empty), topology)
    except UserError as error:
        return embed.sizes, rows, metrics, str(error)
    return embed.sizes, rows, metrics, ""


def test_any_number_of_ranks_gives_the_same_bits(run_distributed, tmp_path):
    folder, empty = str(tmp_path / "set"), str(tmp_path / "empty")
    write_set(folder)
    write_set(empty, {"gallery": []})
    _, alone, metrics, message = embedded(Topology(), folder, empty)
    assert message == f"{empty}: identification: 0 gallery entries, 44 probes"
    ranks = run_distributed(embedded, 2, folder, empty)
    assert [sizes for sizes, *_ in ranks] == [[BLOCK] * 3] * 2
    for mine, theirs in zip(alone, ranks[0][1], strict=True):
        assert torch.equal(mine, theirs)
    assert ranks[1][1] == ()
    # Nobody is left waiting: every rank has the metrics, and every rank hears of a mistake.
    assert [found for *_, found, _ in ranks] == [metrics, metrics]
    assert [error for *_, error in ranks] == [message, message]


def test_a_rank_beyond_the_last_block_calls_as_often(tmp_path):
    folder = str(tmp_path / "set")
    write_set(folder)
    embed = Embed()
    idle = Topology(rank=6)  # without a process group
    embed_set(embed, ShardIndex.load(folder), idle, SIDE, block=64)
    assert embed.sizes == [64]


def test_blocks_are_aligned_and_padded_rows_do_not_count(tmp_path):
    folder = str(tmp_path / "set")
    write_set(folder)
    found = embed_set(Embed(), ShardIndex.load(folder), Topology(), SIDE, block=BLOCK)
    assert found.embeddings.shape == (44, 12)
    assert found.labels.tolist() == [n // PER_CLASS for n in range(44)]
    assert np.flatnonzero(found.gallery).tolist() == list(range(0, 44, PER_CLASS))


def test_the_index_says_who_is_enrolled(tmp_path):
    folder = str(tmp_path / "set")
    write_set(folder, {"gallery": [3, 7, 8]})
    found = embed_set(Embed(), ShardIndex.load(folder), Topology(), SIDE)
    assert np.flatnonzero(found.gallery).tolist() == [3, 7, 8]


def test_flip_adds_the_mirrored_image(tmp_path):
    folder = str(tmp_path / "set")
    write_set(folder)
    index = ShardIndex.load(folder)
    plain = embed_set(Embed(), index, Topology(), SIDE)
    both = embed_set(Embed(), index, Topology(), SIDE, flip=True)
    mirror = Embed()
    mirrored = embed_set(lambda x: mirror(x.flip(-1)), index, Topology(), SIDE)
    np.testing.assert_allclose(both.embeddings, plain.embeddings + mirrored.embeddings, atol=1e-6)


def test_the_metrics_of_a_run(tmp_path):
    folder = str(tmp_path / "set")
    write_set(folder)
    evaluation = evaluate(Embed(), config(folder), Topology())
    metrics, details = evaluation.metrics, evaluation.details
    assert "the first image of each class" in evaluation.protocol
    assert metrics["chance"] == 1 / CLASSES
    assert metrics["gallery"] == CLASSES
    assert metrics["probes"] == 44 - CLASSES
    assert metrics["pairs"] == 60
    assert metrics["impostors"] == (44 - CLASSES) * (CLASSES - 1)
    assert metrics["rank1"] > 0.9
    assert metrics["accuracy"] > 0.9
    assert metrics["tar@far=1e-2"] >= metrics["tar@far=1e-3"] >= metrics["tar@far=1e-4"]
    assert details["right"][:, 0].mean() == metrics["rank1"]
    assert details["nearest"].shape == (33, 5)
    assert set(details["nearest"].ravel()) <= set(range(0, 44, PER_CLASS))
    evaluation.save(tmp_path / "run" / "evaluation.npz")
    with np.load(tmp_path / "run" / "evaluation.npz") as stored:
        np.testing.assert_array_equal(stored["tar"], details["tar"])


def test_pictures_are_found_when_they_are_asked_for(tmp_path):
    folder = str(tmp_path / "set")
    write_set(folder)
    settings = config(folder)
    plain = evaluate(Embed(), settings, Topology())
    found = evaluate_heldout(
        Embed(), settings.evaluate, SIDE, settings.run.seed, Topology(), with_pictures=True
    )
    assert found.metrics == plain.metrics
    more = found.details.keys() - plain.details.keys()
    assert {"class_accuracy", "confused", "genuine_pairs", "impostor_pairs", "map_points"} <= more
    assert found.details["class_accuracy"].sum() == CLASSES
    assert len(found.details["map_points"]) == CLASSES * PER_CLASS
    found.save(tmp_path / "evaluation.npz")
    assert (tmp_path / "evaluation.npz").stat().st_size < 100_000


def test_a_model_of_nan_scores_nothing(tmp_path, caplog):
    folder = str(tmp_path / "set")
    write_set(folder)
    metrics = evaluate(
        lambda images: torch.full((len(images), 4), float("nan")), config(folder), Topology()
    ).metrics
    assert metrics["rank1"] == 0.0
    assert metrics["tar@far=1e-2"] == 0.0
    assert metrics["accuracy"] == 0.5
    assert "44 of 44 embeddings are not finite" in caplog.text


FONTS = {
    "fonts": ["plain.ttf", "easy-bold.ttf", "easy.ttc#1", "hard.ttf"],
    "font": [number % PER_CLASS for number in range(CLASSES * PER_CLASS)],
}


def test_figures_for_the_probes_of_some_typefaces(tmp_path):
    folder = str(tmp_path / "set")
    write_set(folder, FONTS)
    settings = config(folder)
    settings.evaluate.typefaces = {"easy": "easy*", "hard": "hard.tt?", "all": "*"}
    metrics = evaluate(Embed(), settings, Topology()).metrics
    sizes = [metrics[f"{name}/probes"] for name in ("easy", "hard", "all")]
    assert sizes == [2 * CLASSES, CLASSES, 3 * CLASSES]
    for key in ("rank1", "rank5", "tar@far=1e-2", "tar@far=1e-4"):
        assert metrics[f"all/{key}"] == metrics[key]
    both = (2 * metrics["easy/rank1"] + metrics["hard/rank1"]) / 3  # all use the same gallery
    assert both == pytest.approx(metrics["rank1"], abs=1e-12)


def test_typefaces_that_are_not_there_are_refused(tmp_path):
    with_fonts, without = str(tmp_path / "with_fonts"), str(tmp_path / "without")
    write_set(with_fonts, FONTS)
    write_set(without)
    for folder, message in (
        (
            with_fonts,
            r"evaluate.typefaces.soft=soft\*: no probe .*; there are easy-bold.ttf, easy.ttc#1",
        ),
        (without, "only sets of `mhe data glyphs` say which typeface"),
    ):
        settings = config(folder)
        settings.evaluate.typefaces = {"soft": "soft*"}
        with pytest.raises(UserError, match=message):
            evaluate(Embed(), settings, Topology())
