"""Closed-set classification against float64 over all classes, on any number of ranks."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from launcher import cli
from mhe_dist.backbone.export import ExportOptions
from mhe_dist.config.data import MixConfig
from mhe_dist.config.schema import Config, EvaluateConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError, UserError
from mhe_dist.heads import row_head
from mhe_dist.heads.base import Head
from mhe_dist.heads.classifier import build_classifier
from mhe_dist.heads.multilevel import cascade, product
from mhe_dist.heads.multilevel.base import LevelHead
from mhe_dist.heads.multilevel.cascade import MultiHeadCascade
from mhe_dist.heads.multilevel.product import MultiHeadProduct
from mhe_dist.heads.row_head import RowHead
from mhe_dist.tracking.jsonl import read_records
from pipelines.embedding.embed import embed_source
from pipelines.embedding.embeddings import embed_set
from pipelines.evaluate.classification import (
    TrainingLabels,
    evaluate_classification,
    read_training_labels,
    refuse_other_classes,
)
from pipelines.evaluate.in_training import figure_names, refuse_unusable_sets
from pipelines.evaluate.label_prediction import evaluate_labels, open_evaluated_labels
from pipelines.pretrain.main import run_pretraining
from pipelines.runs.checkpoints import class_centres
from pipelines.runs.trained import load_trained_backbone
from pipelines.runs.warm_start import find_checkpoint, trained_head
from pipelines.serving import classifier as serving
from pipelines.serving.classifier import take_classifier, write_classifier
from pipelines.serving.model_card import TrainedModel
from pipelines.shards.index import ShardIndex
from tests.conftest import run_ranks
from tests.support import tiny
from tests.support.data.label_sets import write_labels

HEADS: dict[str, dict[str, Any]] = {
    "mhs": {},
    "full": {"kind": "full"},
    "partial_fc": {"kind": "partial_fc", "partial_fc": {"rate": 0.3}},
    "mhp": {"kind": "mhp", "mhp": {"lengths": [5, 6]}},
    "mhc": {"kind": "mhc", "mhc": {"lengths": [10, 3], "candidates": 1}},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_shards(tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture(scope="module")
def trained(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Config]:
    """A run of 24 steps with a kind of head; each is trained once."""

    @cache
    def train(kind: str) -> Config:
        config = tiny.config(tmp_path_factory.mktemp(kind), shards, head=HEADS[kind])
        run_pretraining(config)
        return config

    return train


def head_of(run: str) -> Head:
    """The head of a run, whose rows are in memory."""
    with trained_head(find_checkpoint(run), Topology()) as head:
        return head


def training_labels(config: Config) -> TrainingLabels:
    found = read_training_labels(config.data, config.run.seed)
    assert found is not None
    return found


def classify(topology: Topology, run: str, shards: str) -> dict[str, float]:
    """The figures of a run's newest checkpoint."""
    backbone = load_trained_backbone(run)
    with trained_head(find_checkpoint(run), topology) as head:
        return evaluate_classification(
            backbone.embed,
            head,
            ShardIndex.load(shards),
            tiny.CLASSES,
            topology,
            tiny.SIDE,
            training_labels(backbone.config).counts,
            exhaustive=True,
        )


def embed_all(run: str, shards: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding of every image in float64 `[N, D]`, and its label."""
    embedded = embed_set(
        load_trained_backbone(run).embed, ShardIndex.load(shards), Topology(), tiny.SIDE
    )
    assert embedded is not None
    return torch.from_numpy(embedded.embeddings).double(), torch.from_numpy(embedded.labels)


def class_scores(run: str, embeddings: torch.Tensor, width: int = tiny.CLASSES) -> torch.Tensor:
    """Scores of every class in float64 `[N, C]`, after the definition of each head.

    Args:
        run: whose newest checkpoint has the rows.
        embeddings: `[N, D]`.
        width: mhc: the best prefixes whose children are scored; other classes have -inf.
    """
    head = head_of(run)
    unit = partial(torch.nn.functional.normalize, dim=1)
    if isinstance(head, RowHead):
        return unit(embeddings) @ unit(class_centres(run, range(tiny.CLASSES)).double()).T
    assert isinstance(head, LevelHead)
    rows = [
        unit(level.bank.read(level.bank.units).double().flatten(0, 1))
        for level in head.levels.values()
    ]
    first = (16 * unit(embeddings) @ rows[0].T).log_softmax(1)
    if isinstance(head, MultiHeadProduct):
        second = (16 * unit(embeddings) @ rows[1].T).log_softmax(1)
        return (first[:, :, None] + second[:, None, :]).flatten(1)
    projection = head.projections["projection_2"].read().double()
    projected = embeddings @ projection[:, :-1].T + projection[:, -1]
    parents = torch.arange(tiny.CLASSES) // head.radix.lengths[1]
    best = first.topk(min(width, first.shape[1])).indices
    scored = (parents[None, :, None] == best[:, None, :]).any(dim=2)
    logits = (16 * unit(projected) @ rows[1].T)[:, : tiny.CLASSES]
    second = logits.masked_fill(~scored, float("-inf")).log_softmax(1)
    return first[:, parents] + second


def best_classes(run: str, shards: str, width: int = tiny.CLASSES) -> torch.Tensor:
    """The classes of every image by falling score in float64, `[N, C]`."""
    embeddings, _ = embed_all(run, shards)
    return class_scores(run, embeddings, width).argsort(dim=1, descending=True)


@pytest.mark.parametrize("kind", HEADS)
def test_figures_are_those_of_all_classes_whatever_the_number_of_ranks(
    kind: str, trained: Callable[[str], Config], shards: str
) -> None:
    run = trained(kind)
    found = classify(Topology(), run.run.path, shards)
    assert found["samples"] == tiny.CLASSES * tiny.IMAGES == found["few_shot/samples"]
    assert found["unknown"] == 0
    assert 1 / tiny.CLASSES < found["top1"] == found["few_shot/top1"] < found["top5"]
    assert ("beam_recall" in found) == (kind == "mhc")
    if ranks := {"mhs": 2, "mhc": 3}.get(kind):
        assert run_ranks(classify, ranks, run.run.path, shards) == [found] * ranks
    order, labels = best_classes(run.run.path, shards, width=5), embed_all(run.run.path, shards)[1]
    right = order[:, :5] == labels[:, None]
    assert found["top1"] == right[:, 0].double().mean().item()
    assert found["top5"] == right.any(dim=1).double().mean().item()
    if kind == "mhc":
        every = best_classes(run.run.path, shards)[:, 0] == order[:, 0]
        assert found["beam_recall"] == every.double().mean().item()


def test_a_beam_of_all_prefixes_finds_what_scoring_all_classes_does(
    trained: Callable[[str], Config],
) -> None:
    run = trained("mhc")
    head = head_of(run.run.path)
    assert isinstance(head, MultiHeadCascade)
    embeddings = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    every = head.predict(embeddings, tiny.CLASSES)  # k is a beam's least width
    assert torch.equal(head.predict_exhaustively(embeddings, 3).classes, every.classes[:, :3])
    narrow = head.predict(embeddings, 1).classes[:, 0] == every.classes[:, 0]
    assert 0.3 < narrow.double().mean() < 1


@pytest.mark.parametrize("kind", HEADS)
def test_predictions_do_not_depend_on_the_size_of_the_chunks(
    kind: str, trained: Callable[[str], Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trained(kind).run.path
    head = head_of(path)
    embeddings = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    whole = head.predict(embeddings, 5)
    for size in (1, 1 << 12):
        for module in (row_head, cascade, product):
            monkeypatch.setattr(module, "PREDICT_BYTES", size)
        parts = head.predict(embeddings, 5)
        assert torch.equal(parts.classes, whole.classes)
        torch.testing.assert_close(parts.scores, whole.scores)


def rank_labels(topology: Topology, run: str, shards: str, url: str) -> dict[str, float]:
    """The figures of a label set."""
    backbone, index = load_trained_backbone(run), ShardIndex.load(shards)
    data = backbone.config.data
    labels = open_evaluated_labels(url, index, data, tiny.CLASSES)
    training = read_training_labels(data, 3)
    with trained_head(find_checkpoint(run), topology) as head:
        return evaluate_labels(backbone.embed, head, index, labels, topology, tiny.SIDE, training)


def test_several_labels_are_ranked_over_all_classes_whatever_the_number_of_ranks(
    trained: Callable[[str], Config],
    shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, index = trained("mhs").run.path, ShardIndex.load(shards)
    own = [int(label) for shard in index.shards for label in shard.labels]
    lists = [
        [label, (label + n) % tiny.CLASSES, label] if n % 5 else [] for n, label in enumerate(own)
    ]
    url = write_labels(str(tmp_path / "labels"), index, lists, tiny.CLASSES).folder
    found = rank_labels(Topology(), run, shards, url)
    assert run_ranks(rank_labels, 2, run, shards, url) == [found] * 2
    best = best_classes(run, shards)[:, :5].tolist()
    pairs = [(row, set(each)) for row, each in zip(best, lists, strict=True) if each]
    hits = [[label in each for label in row] for row, each in pairs]
    assert found["samples"] == len(pairs)
    assert found["p@1"] == pytest.approx(np.mean([each[0] for each in hits]), abs=1e-12)
    assert found["p@5"] == pytest.approx(np.mean(hits), abs=1e-12)
    # All classes have as many training images, so their propensities are one number.
    possible = sum(min(5, len(each)) for _, each in pairs)
    assert found["psp@5"] == pytest.approx(np.sum(hits) / possible, abs=1e-12)
    # All classes are as frequent, so the first five stand for the most frequent ones.
    guessed = np.mean([len(each & set(range(5))) / 5 for _, each in pairs])
    assert found["frequent/p@5"] == pytest.approx(guessed, abs=1e-12)
    assert found["few_shot/labels"] == sum(len(each) for _, each in pairs)
    share = np.sum(hits) / found["few_shot/labels"]
    assert found["few_shot/recall@5"] == pytest.approx(share, abs=1e-12)
    assert cli.run(["evaluate", "labels", run, "--shards", shards, "--labels", url]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{100 * found['p@5']:.2f}" in shown and "PSP" in shown
    saved = json.loads(Path(run, "evaluation", "labels.json").read_text())["results"]
    assert saved == {"shards": shards, "labels": url, "classes": tiny.CLASSES, **found}


def test_label_sets_that_cannot_be_evaluated_are_refused(shards: str, tmp_path: Path) -> None:
    index, data = ShardIndex.load(shards), tiny.config(tmp_path, shards).data
    empty = [[] for _ in range(index.samples)]
    url = write_labels(str(tmp_path / "empty"), index, empty, tiny.CLASSES).folder
    settings = EvaluateConfig(labels=shards, label_set=url)
    with pytest.raises(UserError, match="gives no image a class"):
        refuse_unusable_sets(settings, data, 0, Topology(), tiny.CLASSES)
    with pytest.raises(UserError, match="gives no image a class"):
        open_evaluated_labels(url, index, data, tiny.CLASSES)
    with pytest.raises(UserError, match="it has 30 classes, the run 29"):
        open_evaluated_labels(url, index, data, tiny.CLASSES - 1)
    chosen = data.model_copy(update={"classes": "list.tsv"})
    with pytest.raises(UserError, match="chose and renumbered its classes"):
        open_evaluated_labels(url, index, chosen, tiny.CLASSES)


@pytest.mark.parametrize("kind", ["mhs", "mhc"])
def test_the_verb(
    kind: str,
    trained: Callable[[str], Config],
    shards: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = trained(kind)
    words = ["evaluate", "classification", run.run.path, "--shards", shards, "--exhaustive"]
    assert cli.run(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    figures = classify(Topology(), run.run.path, shards)
    for part in ("top-1", f"{100 * figures['top5']:.2f}", "few-shot, below 20", "360", "Next"):
        assert part in shown
    assert ("the beam finds" in shown) == (kind == "mhc")
    saved = json.loads(Path(run.run.path, "evaluation", "classification.json").read_text())
    assert saved["results"] == {"shards": shards, "classes": tiny.CLASSES, **figures}


@pytest.mark.parametrize("source", ["folder", "shards"])
def test_classify_names_what_the_head_finds(
    source: str,
    trained: Callable[[str], Config],
    shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trained("mhs")
    monkeypatch.chdir(tmp_path)
    images, keys = shards, [f"{number:07d}" for number in range(tiny.CLASSES * tiny.IMAGES)]
    if source == "folder":
        images, keys = str(tmp_path / "images"), ["a.jpg", "b/c.png"]
        rng = np.random.default_rng(0)
        for key in keys:
            Path(images, key).parent.mkdir(exist_ok=True, parents=True)
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(Path(images, key))
        Path(images, "broken.jpg").write_bytes(b"no image")
    names = {n: f"class {n} <b>" for n in range(tiny.CLASSES)}
    rows = "".join(f"{n}\t12\t{name}\n" for n, name in names.items())
    Path(shards, "classes.tsv").write_text("class\tsamples\tname\n" + rows)
    assert cli.run(["classify", run.run.path, "--images", images, "--top", "3"]) == 0
    shown = capsys.readouterr().out
    assert "class" in shown and "Next" in shown
    assert ("left out: broken.jpg" in shown) == (source == "folder")
    with Path("classified", "classes.csv").open(newline="", encoding="utf-8") as stream:
        table = list(csv.DictReader(stream))
    backbone = load_trained_backbone(run.run.path)
    head = head_of(run.run.path)
    embedded = embed_source(backbone.embed, images, Topology(), tiny.SIDE)
    assert embedded is not None and set(embedded.keys) == set(keys)
    expected = head.predict(torch.from_numpy(embedded.rows), 3)
    found = [(row["image"], int(row["rank"]), int(row["class"]), row["name"]) for row in table]
    assert found == [
        (key, rank, number, names[number])
        for key, classes in zip(embedded.keys, expected.classes.tolist(), strict=True)
        for rank, number in enumerate(classes, 1)
    ]
    scores = torch.tensor([float(row["score"]) for row in table]).view(-1, 3)
    torch.testing.assert_close(scores, expected.scores, atol=1e-4, rtol=0)
    with Image.open("classified/sheet.png") as sheet:
        assert sheet.width > 600
    Path(shards, "classes.tsv").unlink()


def test_a_run_records_the_figures_and_learns_the_same(
    trained: Callable[[str], Config], shards: str, tmp_path: Path
) -> None:
    run = trained("mhs")
    index = ShardIndex.load(shards)
    lists = [[n % tiny.CLASSES, 3] for n in range(index.samples)]
    url = write_labels(str(tmp_path / "labels"), index, lists, tiny.CLASSES).folder
    evaluate = {"classification": shards, "labels": shards, "label_set": url, "every_steps": 12}
    watched = tiny.config(tmp_path, shards, evaluate=evaluate)
    summary = run_pretraining(watched)
    found = classify(Topology(), run.run.path, shards) | {"unknown": 0.0}
    during = {f"classification/{name}": value for name, value in found.items()}
    ranked = rank_labels(Topology(), run.run.path, shards, url)
    during |= {f"labels/{name}": value for name, value in ranked.items()}
    assert summary["heldout"] == during
    missing = set(figure_names(watched.evaluate)) - set(during)
    assert set(during) <= set(figure_names(watched.evaluate))
    # All classes have twelve images.
    assert all("many_shot/" in name or "medium_shot/" in name for name in missing)
    records = read_records(f"{watched.run.path}/metrics.jsonl")
    for name in ("classification/top1", "labels/p@1"):
        steps = [record["step"] for record in records if f"heldout/{name}" in record]
        assert steps == [11, 23]  # counted from 0
    assert not tiny.differing(run, watched)


def test_other_class_ids_are_refused_before_a_run(tmp_path: Path, shards: str) -> None:
    other = tiny.write_shards(tmp_path / "other", classes=2)
    for folder, names in ((other, "ab"), (str(tmp_path / "train"), "xb")):
        Path(folder).mkdir(exist_ok=True)
        rows = "".join(f"{number}\t12\t{name}\n" for number, name in enumerate(names))
        Path(folder, "classes.tsv").write_text("class\tsamples\tname\n" + rows)
    config = tiny.config(tmp_path, str(tmp_path / "train"), evaluate={"classification": other})
    with pytest.raises(UserError, match=r"class 0 is 'a'.*it is 'x'"):
        refuse_unusable_sets(config.evaluate, config.data, 0, Topology(), tiny.CLASSES)


def test_images_of_other_classes_are_named_or_refused(
    tmp_path: Path, shards: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny.config(tmp_path, shards, train={"max_steps": 1})
    run_pretraining(config)
    more = tiny.write_shards(tmp_path / "more", classes=tiny.CLASSES + 10)
    found = classify(Topology(), config.run.path, more)
    assert (found["samples"], found["unknown"]) == (tiny.CLASSES * tiny.IMAGES, 10 * tiny.IMAGES)
    assert "120 images of 10 classes that the run does not have" in caplog.text
    assert "class 30, 31, 32, 33, 34, 35, 36, 37, 38, 39" in caplog.text
    backbone = load_trained_backbone(config.run.path)
    head = head_of(config.run.path)
    with pytest.raises(UserError, match="no image is of one of the 0 classes"):
        evaluate_classification(
            backbone.embed, head, ShardIndex.load(more), 0, Topology(), tiny.SIDE
        )


def test_class_ids_that_mean_something_else_are_refused(tmp_path: Path, shards: str) -> None:
    other = tiny.write_shards(tmp_path / "other", classes=3)
    data = tiny.config(tmp_path, shards).data
    refuse_other_classes(ShardIndex.load(other), data)  # nothing tells names
    here = Path(other, "classes.tsv")
    here.write_text("class\tsamples\tname\n0\t12\ta\n1\t12\tb\n2\t12\tc\n")
    train = tmp_path / "named"
    train.mkdir()
    named = data.model_copy(update={"shards": str(train)})
    (train / "classes.tsv").write_text("class\tsamples\tname\n0\t9\ta\n1\t9\tb\n2\t9\tc\n3\t9\td\n")
    refuse_other_classes(ShardIndex.load(other), named)
    here.write_text("class\tsamples\tname\n0\t12\ta\n1\t12\tx\n2\t12\tc\n")
    with pytest.raises(UserError, match=r"class 1 is 'x'.*it is 'b'.*--heldout-images"):
        refuse_other_classes(ShardIndex.load(other), named)


def test_chosen_and_labelled_classes_are_not_taken_for_those_of_the_shards(
    tmp_path: Path, shards: str
) -> None:
    """The ids of a run of chosen classes are others: its top-1 was that of a guess, unsaid."""
    other, data = ShardIndex.load(shards), tiny.config(tmp_path, shards).data
    chosen = data.model_copy(update={"classes": "list.tsv"})
    with pytest.raises(UserError, match=r"renumbered its classes \(data.classes=list.tsv\)"):
        refuse_other_classes(other, chosen)
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "classes.tsv").write_text("class\tsamples\tname\n0\t9\tcluster 0\n")
    here = tmp_path / "here"
    here.mkdir()
    (here / "classes.tsv").write_text("class\tsamples\tname\n0\t9\ta\n")
    named = replace(other, folder=str(here))
    for changes in ({"labels": str(labels)}, {"labels": str(labels), "images_per_class": 3}):
        with pytest.raises(UserError, match=r"class 0 is 'a', in the training set .*labels it is"):
            refuse_other_classes(named, data.model_copy(update=changes))


def test_a_set_of_a_mixture_is_not_compared_by_the_ids_of_the_whole(
    tmp_path: Path, shards: str
) -> None:
    """The classes of its second set have other ids: all of its images counted as wrong."""
    index, data = ShardIndex.load(shards), tiny.config(tmp_path, shards).data
    mixed = data.model_copy(update={"mix": [MixConfig(shards=shards)]})
    with pytest.raises(UserError, match=r"renumbered its classes \(data.mix\)"):
        refuse_other_classes(index, mixed)
    url = write_labels(str(tmp_path / "labels"), index, [[0]] * index.samples, 2).folder
    with pytest.raises(UserError, match=r"labels: the run .* its classes \(data.mix\)"):
        open_evaluated_labels(url, index, mixed, 2 * tiny.CLASSES)


def test_training_images_are_counted(tmp_path: Path, shards: str) -> None:
    data = tiny.config(tmp_path, shards).data
    found = read_training_labels(data, 3)
    assert found is not None and found.images == tiny.CLASSES * tiny.IMAGES
    assert found.counts.tolist() == [tiny.IMAGES] * tiny.CLASSES
    chosen = data.model_copy(update={"images_per_class": 2})  # a mixture: others in each epoch
    found = read_training_labels(chosen, 3)
    assert found is not None and found.counts.tolist() == [tiny.IMAGES] * tiny.CLASSES
    gone = data.model_copy(update={"shards": str(tmp_path / "gone")})
    assert read_training_labels(gone, 3) is None


def images_of(shards: str) -> np.ndarray:
    """Every image of a set, uint8 `[N, H, W, 3]`, in the order in which `embed_set` has them."""
    found = embed_set(
        lambda images: images.permute(0, 2, 3, 1).flatten(1).float(),
        ShardIndex.load(shards),
        Topology(),
        tiny.SIDE,
    )
    assert found is not None
    return found.embeddings.astype(np.uint8).reshape(-1, tiny.SIDE, tiny.SIDE, 3)


@pytest.mark.parametrize("kind", HEADS)
def test_a_classifier_of_every_kind_names_the_best_classes(
    kind: str, trained: Callable[[str], Config], shards: str
) -> None:
    path = trained(kind).run.path
    classes, scores = build_classifier(head_of(path), 5)(embed_all(path, shards)[0].float())
    assert torch.equal(classes, best_classes(path, shards, width=5)[:, :5])
    assert (scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize(
    ("options", "file"),
    [
        (ExportOptions(), "classifier.onnx"),
        (ExportOptions(half=True, pixels=True), "classifier_uint8_fp16.onnx"),
    ],
)
def test_the_answers_of_a_file_are_compared_with_the_head(
    options: ExportOptions,
    file: str,
    trained: Callable[[str], Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = load_trained_backbone(trained("full").run.path)
    model = TrainedModel(backbone.model, backbone.config, 24, backbone.trained_on, {})
    images = torch.randint(0, 256, (40, 3, tiny.SIDE, tiny.SIDE), dtype=torch.uint8)
    chosen = take_classifier(head_of(backbone.path), model, images, 5)
    shift = 0

    def write(network: torch.nn.Module, *rest: Any) -> Callable[[torch.Tensor], Any]:
        Path(rest[1]).write_text(f"shifted by {shift}")
        return lambda inputs: (network(inputs)[0] + shift, network(inputs)[1])

    monkeypatch.setattr(serving, "write_onnx", write)
    path, difference = write_classifier("onnx", model, chosen, str(tmp_path), images, options)
    assert path == f"{tmp_path}/{file}"
    assert difference < (0.2 if options.half else 1e-4)
    shift = 1
    count = r"\d\d" if options.half else "40"  # what is near enough in float16 counts as equal
    with pytest.raises(RunError, match=f"{count} of 40 images get other classes than by the head"):
        write_classifier("onnx", model, chosen, str(tmp_path), images, options)
    assert Path(path).read_text() == "shifted by 0"
    written = {"README.md", "exports.json", file}
    assert {each.name for each in tmp_path.iterdir()} == written
    named = chosen._replace(names={0: "a class"})
    shift = 0
    write_classifier("onnx", model, named, str(tmp_path), images, options)
    assert (tmp_path / "class_names.tsv").exists()
    write_classifier("onnx", model, chosen, str(tmp_path), images, options)
    assert (tmp_path / "class_names.tsv").exists(), "they are of the same model"
    other = model._replace(step=25)
    write_classifier("onnx", other, chosen, str(tmp_path), images, options)
    assert {each.name for each in tmp_path.iterdir()} == written
    (tmp_path / "class_names.tsv").write_text("of the user")
    write_classifier("onnx", model, chosen, str(tmp_path), images, options)
    assert (tmp_path / "class_names.tsv").read_text() == "of the user"


@pytest.mark.slow
def test_exports_with_the_head_name_the_best_of_all_classes(
    trained: Callable[[str], Config],
    shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = trained("mhs")
    table = "".join(f"{number}\t12\tclass {number}\n" for number in range(tiny.CLASSES))
    Path(shards, "classes.tsv").write_text("class\tsamples\tname\n" + table)
    words = ["export", run.run.path, "--classify", "5", "--out", str(tmp_path)]
    try:
        assert cli.run([*words, "--to", "torch-export", "--to", "mlflow"]) == 0
    finally:
        Path(shards, "classes.tsv").unlink()
    shown = capsys.readouterr().out
    assert "classifier.pt2" in shown and "mlflow-classifier" in shown
    order = best_classes(run.run.path, shards)
    pixels = images_of(shards)
    inputs = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    program = torch.export.load(f"{tmp_path}/classifier.pt2").module()
    assert torch.equal(program(inputs)[0], order[:, :5])
    (file,) = (tmp_path / "mlflow-classifier").rglob("*.onnx")
    session = onnxruntime.InferenceSession(file)
    classes, scores = session.run(["classes", "scores"], {"images": inputs.numpy()})
    assert np.array_equal(classes, order[:, :5].numpy())
    assert (np.diff(scores) <= 0).all()
    about = session.get_modelmeta().custom_metadata_map
    assert (about["head"], about["num_classes"], about["top"]) == ("mhs", "30", "5")
    served = mlflow.pyfunc.load_model(f"{tmp_path}/mlflow-classifier")
    table = served.predict({"image": list(pixels[:70])})  # more than it computes at once
    assert table["classes"].tolist() == order[:70, :5].tolist()
    assert table["names"][69] == [f"class {number}" for number in order[69, :5].tolist()]
    np.testing.assert_allclose(np.array(table["scores"].tolist()), scores[:70], atol=1e-4)
    names = (tmp_path / "class_names.tsv").read_text().splitlines()
    assert names[:2] == ["class\tname", "0\tclass 0"] and len(names) == tiny.CLASSES + 1
    card = (tmp_path / "README.md").read_text()
    assert "### torch-export-classifier" in card and "### mlflow-classifier" in card


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", HEADS)
def test_ten_thousand_images_get_the_best_of_all_classes_from_the_command_and_from_every_file(
    kind: str, trained: Callable[[str], Config], tmp_path: Path
) -> None:
    """Every place of an answer has the score of that place in float64, but for rounding."""
    k, run = 10, trained(kind).run.path  # with ten candidates the beam has all prefixes
    shards = tiny.write_shards(tmp_path / "images", classes=-(-10_000 // tiny.IMAGES), first=1)
    scores = class_scores(run, embed_all(run, shards)[0])
    best, order = scores.topk(k)
    assert len(best) >= 10_000
    words = ["classify", run, "--images", shards, "--top", str(k), "--out", f"{tmp_path}/named"]
    assert cli.run(words) == 0
    formats = ["--to", "onnx", "--to", "torch-export", "--to", "mlflow"]
    assert cli.run(["export", run, "--classify", str(k), *formats, "--out", str(tmp_path)]) == 0
    pixels = images_of(shards)
    inputs = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with (tmp_path / "named" / "classes.csv").open(newline="", encoding="utf-8") as stream:
        named = [int(row["class"]) for row in csv.DictReader(stream)]
    session = onnxruntime.InferenceSession(tmp_path / "classifier.onnx")
    served = mlflow.pyfunc.load_model(f"{tmp_path}/mlflow-classifier")
    answers = {
        "mhe classify": torch.tensor(named).view(-1, k),
        "onnx": torch.from_numpy(session.run(["classes"], {"images": inputs.numpy()})[0]),
        "torch-export": torch.export.load(f"{tmp_path}/classifier.pt2").module()(inputs)[0],
        "mlflow": torch.tensor(served.predict({"image": list(pixels)})["classes"].tolist()),
    }
    for name, found in answers.items():
        assert (found.sort(dim=1).values.diff(dim=1) > 0).all(), f"{name}: a class twice"
        torch.testing.assert_close(scores.gather(1, found), best, rtol=0, atol=1e-4, msg=name)
        same = (found == order).all(dim=1).double().mean().item()
        assert same > 0.999, f"{name}: {same:.4%} of the images get the same classes in order"
