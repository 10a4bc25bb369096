"""Exports with the head: images in, the best classes and their scores out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhe_dist.backbone.export import (
    HALF_TOLERANCE,
    ONNX_TOLERANCE,
    ExportedBackbone,
    ExportOptions,
    example_images,
    export_metadata,
)
from mhe_dist.backbone.model import fold_neck
from mhe_dist.backbone.normalization import normalize_images
from mhe_dist.backbone.traced import write_onnx, write_program
from mhe_dist.config.schema import Config
from mhe_dist.errors import RunError, UserError
from mhe_dist.heads.base import Head, TopK
from mhe_dist.heads.classifier import build_classifier, classifier_bytes
from pipelines.data.mixture.class_list import names_in_run
from pipelines.serving.mlflow_model import load_mlflow_model, write_mlflow_model
from pipelines.serving.model_card import TrainedModel, write_model_card
from pipelines.serving.output_folder import (
    NAMES_FILE,
    export_name,
    remove_other_names,
    staged_export,
)
from pipelines.shards.tables import write_table

ClassifierFormat = Literal["onnx", "torch-export", "mlflow"]

OUTPUTS: Final = ("classes", "scores")
# A protobuf message has 2 GiB at most. A program has no limit but what one ships and loads.
LARGEST: Final[dict[str, int]] = {"onnx": (1 << 31) - (1 << 24), "torch-export": 8 << 30}
_OTHER_AT_THE_END: Final = {False: 0.05, True: 0.25}  # share of images, by `half`
_GB: Final = 1e9


class TrainedClassifier(NamedTuple):
    """A trained head, ready to be exported behind its backbone.

    Attributes:
        network: embeddings to the k best classes and their scores.
        k: classes that are named.
        num_classes: C.
        expected: what the head predicts for the images of the comparison.
        names: of the classes; empty: they are not known.
    """

    network: nn.Module
    k: int
    num_classes: int
    expected: TopK
    names: Mapping[int, str]


class ClassifyingNetwork(nn.Module):
    """The folded backbone and the head's classifier behind it."""

    def __init__(self, backbone: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.backbone, self.classifier = backbone, classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images as `ExportedBackbone` takes them -> classes and scores, `[N, k]` each."""
        found: tuple[Tensor, Tensor] = self.classifier(self.backbone(images))
        return found


def take_classifier(head: Head, trained: TrainedModel, images: Tensor, k: int) -> TrainedClassifier:
    """The classifier of a head whose rows are all in this process, and what it predicts.

    Args:
        head: of the same checkpoint as the model.
        trained: the model; its config says where the names of the classes are.
        images: uint8 `[N, 3, H, W]` to compare with.
        k: classes to name.

    Raises:
        UserError: k exceeds the number of classes.
    """
    network = build_classifier(head, k)
    with torch.no_grad():
        embeddings = trained.model(normalize_images(images, trained.model.normalization))
    count = int(trained.trained_on["classes"])
    names = names_in_run(trained.config.data, range(count))
    return TrainedClassifier(network, k, count, head.predict(embeddings, k), names)


def write_classifier(
    name: ClassifierFormat,
    trained: TrainedModel,
    classifier: TrainedClassifier,
    folder: str,
    images: Tensor,
    options: ExportOptions,
) -> tuple[str, float]:
    """Write the backbone with its head into `folder`, the classes' names and a card beside it.

    Args:
        name: of the format.
        trained, classifier: what is exported.
        folder: path or URL; gets `classifier.onnx` (`_uint8`, `_fp16`), `classifier.pt2` or
            `mlflow-classifier`.
        images: those that `take_classifier` was given.
        options: see `ExportOptions`; `half` and `pixels` are for ONNX alone.

    Returns:
        Its path or URL, and the largest difference of a score from the head's.

    Raises:
        RunError: its answers differ from the head's; see `compare_answers`.
        UserError: ONNX has no such operator set.
    """
    path, whole = export_name(name, options, with_head=True), name == "mlflow"
    with staged_export(folder, path, f"{name}-classifier", trained, whole) as target:
        write = _write_mlflow if name == "mlflow" else _write_file
        difference = write(name, trained, classifier, target, images, options)
    if classifier.names:
        with staged_export(folder, NAMES_FILE, "class-names", trained) as target:
            write_names(target, classifier.names)
    else:
        remove_other_names(folder, trained)
    return f"{folder}/{path}", difference


def _write_file(
    name: ClassifierFormat,
    trained: TrainedModel,
    classifier: TrainedClassifier,
    path: str,
    images: Tensor,
    options: ExportOptions,
) -> float:
    """An ONNX file or a program; see `write_classifier`."""
    if name == "torch-export":
        options = options._replace(half=False, pixels=False)
    backbone = ExportedBackbone(fold_neck(trained.model), options, trained.model.normalization)
    head = copy.deepcopy(classifier.network).half() if options.half else classifier.network
    network = ClassifyingNetwork(backbone, head).eval()
    about = classifier_metadata(trained, classifier, options)
    example = example_images(trained.config, options.pixels)
    run: Callable[[Tensor], Any]
    if name == "torch-export":
        run = write_program(network, example, path, about)
    else:
        run = write_onnx(network, example, path, OUTPUTS, about, options.opset)
    return _compare(run, trained, classifier, images, path, options)


def _write_mlflow(
    name: ClassifierFormat,
    trained: TrainedModel,
    classifier: TrainedClassifier,
    path: str,
    images: Tensor,
    options: ExportOptions,
) -> float:
    """The model that takes images and names classes; compared with the pixels as it gets them."""
    options = options._replace(pixels=False)
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    onnx, names = f"{path}.onnx", f"{Path(path).parent}/{NAMES_FILE}"  # which it has copies of
    _write_file(name, trained, classifier, onnx, images, options)
    write_names(names, classifier.names)
    write_mlflow_model(onnx, path, pixels[0], 0, names if classifier.names else None)
    write_model_card(path, trained, {"mlflow-classifier": "."})
    model = load_mlflow_model(path)

    def run(inputs: Tensor) -> list[Tensor]:
        # `inputs` are a batch of one or all; the model normalises what is uint8 by itself.
        found = model.predict({"image": list(pixels[: len(inputs)])})
        return [torch.tensor(found[output].tolist()) for output in OUTPUTS]

    return _compare(run, trained, classifier, images, path, options)


def classifier_metadata(
    trained: TrainedModel, classifier: TrainedClassifier, options: ExportOptions
) -> dict[str, str]:
    """What a file says of itself: as `export_metadata`, and of the head."""
    about = export_metadata(trained.model, trained.config, options, trained.origin())
    del about["unit_length"]
    head = trained.config.head
    scores = {True: "s * cosine", False: "inner product + bias"}[head.margin.kind != "none"]
    if head.kind in ("mhp", "mhc"):
        scores = "log-probability, summed over the levels"
    return about | {
        "head": head.kind,
        "num_classes": str(classifier.num_classes),
        "top": str(classifier.k),
        "outputs": json.dumps(list(OUTPUTS)),
        "scores": scores,
    }


def write_names(path: str, names: Mapping[int, str]) -> None:
    """Write a table (tab-separated) of `class` and `name`."""
    write_table(path, (["class", "name"], ([str(n), name] for n, name in names.items())))


def refuse_large_classifier(
    name: str, config: Config, num_classes: int, backbone_bytes: int, half: bool
) -> None:
    """Refuse, before anything is read, a classifier that its format cannot hold.

    Args:
        name: of the format; "mlflow" holds an ONNX file.
        config: of the run.
        num_classes: C.
        backbone_bytes: of the backbone's weights in float32.
        half: whether ONNX's weights are in float16.

    Raises:
        UserError: gives the sizes.
    """
    half = half and name != "torch-export"
    limit = LARGEST["torch-export" if name == "torch-export" else "onnx"]
    rows = classifier_bytes(config.head, num_classes, config.model.embedding_dim)
    both = (rows + backbone_bytes) // (2 if half else 1)
    if both <= limit:
        return
    cures = []
    if not half and name != "torch-export" and both // 2 <= limit:
        cures.append(f"--fp16 makes {both / 2 / _GB:.1f} GB of it")
    if name != "torch-export" and rows + backbone_bytes <= LARGEST["torch-export"]:
        cures.append("--to torch-export holds it")
    cures.append("mhe classify names classes without an export")
    raise UserError(
        f"--classify, --to {name}: the rows of head.kind={config.head.kind} with {num_classes:,} "
        f"classes take {rows / _GB:.1f} GB, and {both / _GB:.1f} GB would be written, with the "
        f"backbone{' and in float16' if half else ''}; at most {limit / _GB:.1f} GB are: "
        f"{'; '.join(cures)}"
    )


def _compare(
    run: Callable[[Tensor], Any],
    trained: TrainedModel,
    classifier: TrainedClassifier,
    images: Tensor,
    path: str,
    options: ExportOptions,
) -> float:
    """The largest difference over a batch of one and a batch of all images."""
    inputs = normalize_images(images, trained.model.normalization)
    if options.pixels:
        inputs = images.permute(0, 2, 3, 1).contiguous()
    largest = 0.0
    for count in (len(images), 1):
        with torch.no_grad():
            found = TopK(*run(inputs[:count]))
        expected = TopK(*(part[:count] for part in classifier.expected))
        largest = max(largest, compare_answers(found, expected, path, options.half))
    return largest


def compare_answers(found: TopK, expected: TopK, path: str, half: bool = False) -> float:
    """The largest difference between the scores of an export and of the head.

    Args:
        found, expected: k best of the same images.
        path: of the export, for the message.
        half: whether it computes in float16.

    Raises:
        RunError: a score differs by more than the tolerance; or a class does where no other score
            is that near. At the last place, whose next one is not known, a few images may have
            another class of the same score.
    """
    tolerance = HALF_TOLERANCE if half else ONNX_TOLERANCE
    known = expected.scores.isfinite()
    allowed = tolerance * max(1.0, expected.scores[known].abs().amax().item())
    differences = (found.scores - expected.scores).abs()
    differences[found.scores == expected.scores] = 0.0  # -inf, too: a class that is not there
    if not (worst := differences.max().item()) <= allowed:
        raise RunError(
            f"{path}: a score differs from the head's by {worst:.2e} ({allowed:.0e} is allowed)"
        )
    ties = expected.scores.diff(dim=1).abs() <= 2 * allowed
    near = F.pad(ties, (1, 0)) | F.pad(ties, (0, 1))
    wrong = (found.classes != expected.classes) & ~near
    at_the_end = max(1, int(_OTHER_AT_THE_END[half] * len(wrong)))
    if wrong[:, :-1].any() or wrong[:, -1].sum() > at_the_end:
        count = int(wrong.any(dim=1).sum())
        raise RunError(f"{path}: {count} of {len(wrong)} images get other classes than by the head")
    return worst
