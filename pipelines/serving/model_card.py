"""Model cards: a README.md beside an export, in the form that the Hugging Face Hub reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from huggingface_hub import EvalResult, ModelCardData
from omegaconf import OmegaConf

from mhe_dist.backbone.model import Backbone, digest_model
from mhe_dist.backbone.names import is_iresnet
from mhe_dist.config.schema import Config
from pipelines.storage.urls import atomic_write

CARD: Final = "README.md"
_ANSWERS: Final = (
    "The classes are int64 `[N, k]`, the best first; their names, where they are known, are in "
    "`class_names.tsv`. The scores `[N, k]` are the head's."
)
_TAG: Final = "mhe"
_TASK: Final = "image-feature-extraction"
_LOADED: Final = (
    *("timm", "onnx", "onnx-uint8", "torch-export", "mlflow"),
    *("onnx-classifier", "torch-export-classifier", "mlflow-classifier"),
)
_COUNTS: Final = ("gallery", "probes", "pairs", "impostors", "genuine")
_SECTIONS: Final = ("model", "head", "optim", "train")  # those without paths of a user's machines


class TrainedModel(NamedTuple):
    """A trained backbone and what is known of it.

    Attributes:
        model: in evaluation mode, on the CPU.
        config: of its run.
        step: completed steps.
        trained_on: `data_digest`, `classes`, `samples`, as far as they are known.
        figures: of the held-out evaluation of this step; empty: there was none.
        protocol: of the figures, in words.
    """

    model: Backbone
    config: Config
    step: int
    trained_on: Mapping[str, Any]
    figures: Mapping[str, float]
    protocol: str = ""

    def origin(self) -> dict[str, str]:
        """See `mhe_dist.backbone.export.export_metadata`."""
        digest = str(self.trained_on.get("data_digest") or "")
        return {"step": str(self.step), "data_digest": digest}

    def identity(self) -> dict[str, str]:
        """What tells it from every other trained model: run, origin and digest of the weights."""
        return {
            "run": self.config.run.name,
            **self.origin(),
            "weights": digest_model(self.model),
        }


def write_model_card(
    folder: str,
    trained: TrainedModel,
    exports: Mapping[str, str],
    others: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write `README.md` into a folder; see `model_card`."""
    with atomic_write(f"{folder}/{CARD}") as stream:
        stream.write(model_card(trained, exports, others).encode())


def is_model_card(text: str) -> bool:
    """Whether a file begins as the cards here do, whatever has been added to it since."""
    header = text.partition("\n---")[0]
    return header.startswith("---\n") and f"- {_TAG}" in header.splitlines()


def model_card(
    trained: TrainedModel,
    exports: Mapping[str, str],
    others: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The text of a card, its YAML header included.

    Args:
        trained: what was exported.
        exports: format -> path below the folder of the card, `.` for the folder itself; a format
            that is not loaded from there is left out.
        others: path -> what it is of, of exports beside it that are not of this model.
    """
    parts = [
        f"---\n{_header(trained)}\n---",
        f"# {trained.config.run.name}",
        _description(trained),
        _figures(trained),
        "## How to load it",
        *(_loading(name, exports[name], trained) for name in _LOADED if name in exports),
        *_others(others),
        _licence(),
        _training(trained),
    ]
    return "\n\n".join(parts) + "\n"


def _header(trained: TrainedModel) -> str:
    results = [
        EvalResult(
            task_type=_TASK,
            dataset_type="custom",
            dataset_name="held-out set of the run",
            metric_type=name,
            metric_value=round(value, 6),
        )
        for name, value in trained.figures.items()
        if name not in (*_COUNTS, "chance")
    ]
    data = ModelCardData(
        license="unknown",
        library_name="timm",
        pipeline_tag=_TASK,
        tags=["timm", "image-embeddings", "metric-learning", _TAG],
        model_name=trained.config.run.name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def _description(trained: TrainedModel) -> str:
    config, how = trained.config, trained.model.normalization
    side, dim = config.data.image_size, config.model.embedding_dim
    rows = {"architecture": f"`{config.model.name}` of timm", "steps": f"{trained.step:,}"}
    known = trained.trained_on
    if known.get("samples") and known.get("classes"):
        rows["trained on"] = f"{known['samples']:,} images of {known['classes']:,} classes"
    if digest := known.get("data_digest"):
        rows["digest of the data"] = f"`{digest}`"
    rows["input"] = (
        f"RGB, the shorter side scaled to {side}, the middle square; "
        f"`(pixels / 255 - mean) / std` with mean {list(how.mean)}, std {list(how.std)}"
    )
    rows["output"] = f"{dim} numbers; compare them by cosine"
    table = _table(("", ""), rows.items())
    about = (
        f"A backbone that turns an image of {side} x {side} pixels into an embedding of {dim} "
        "numbers: images of one class lie near each other, also of classes that it never saw. "
        "Trained by mhe."
    )
    return f"{about}\n\n{table}"


def _figures(trained: TrainedModel) -> str:
    if not trained.figures:
        return "## Figures\n\nNo held-out figures of this step are known."
    rows = (
        (name, f"{value:,.0f}" if name in _COUNTS else f"{100 * value:.2f} %")
        for name, value in trained.figures.items()
    )
    said = f"Of the held-out set; {trained.protocol}.\n\n" if trained.protocol else ""
    return f"## Figures\n\n{said}{_table(('figure', 'value'), rows)}"


def _table(header: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [header, ("---", "---"), *rows]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)


def _loading(name: str, path: str, trained: TrainedModel) -> str:
    side, where = trained.config.data.image_size, json.dumps(path)
    folder = json.dumps(f"local-dir:{path}")
    ours = ""
    if is_iresnet(trained.config.model.name):
        ours = "import mhe_dist.backbone.iresnet  # which timm does not have\n"
    code = {
        "timm": f"{ours}import timm\nnet = timm.create_model({folder}, pretrained=True).eval()",
        "onnx": f"import onnxruntime\nsession = onnxruntime.InferenceSession({where})\n"
        "about = session.get_modelmeta().custom_metadata_map  # image_size, mean, std, ...\n"
        'embeddings = session.run(None, {"images": images})[0]',
        "onnx-uint8": "import numpy, onnxruntime\nfrom PIL import Image\n"
        f"session = onnxruntime.InferenceSession({where})\n"
        f'image = Image.open("photo.jpg").convert("RGB").resize(({side}, {side}))\n'
        'embeddings = session.run(None, {"images": numpy.asarray(image)[None]})[0]',
        "torch-export": f"import torch\nnet = torch.export.load({where}).module()",
        "mlflow": f"import mlflow\nmodel = mlflow.pyfunc.load_model({where})\n"
        'embeddings = model.predict({"image": [open("photo.jpg", "rb").read()]})',
        "onnx-classifier": f"import onnxruntime\nsession = onnxruntime.InferenceSession({where})\n"
        "about = session.get_modelmeta().custom_metadata_map  # image_size, mean, std, ...\n"
        'classes, scores = session.run(None, {"images": images})',
        "mlflow-classifier": f"import mlflow\nmodel = mlflow.pyfunc.load_model({where})\n"
        'found = model.predict({"image": [open("photo.jpg", "rb").read()]})\n'
        'names, scores = found["names"][0], found["scores"][0]',
        "torch-export-classifier": f"import torch\nnet = torch.export.load({where}).module()\n"
        "classes, scores = net(images)",
    }[name]
    inputs = f"Images are as for the backbone, float32 `[N, 3, {side}, {side}]`" + (
        f", or uint8 `[N, {side}, {side}, 3]` where `about` says so."
        if name == "onnx-classifier"
        else "."
    )
    notes = {
        "timm": "With `num_classes=0`, timm leaves the embedding layer out: what comes out are the "
        f"{_features(trained)} pooled features before it, not the embedding. Another number of "
        "classes puts a fresh layer in its place.",
        "onnx": f"`images` are float32 `[N, 3, {side}, {side}]`, normalised as above; N is free.",
        "onnx-uint8": f"`images` are uint8 `[N, {side}, {side}, 3]`, RGB pixels as image readers "
        "give them: the file normalises them itself.",
        "torch-export": f"Takes float32 `[N, 3, {side}, {side}]`, normalised as above; N is free.",
        "mlflow": "Takes encoded images (bytes; base64 in JSON) and prepares them itself. Served "
        'with `mlflow models serve`, it answers `{"dataframe_records": [{"image": "<base64>"}]}`.',
        "onnx-classifier": f"{inputs} {_ANSWERS}",
        "torch-export-classifier": f"{inputs} {_ANSWERS}",
        "mlflow-classifier": "As the MLflow model of the backbone, but a row for each image has "
        "`classes`, `names` and `scores`, lists with the best class first.",
    }[name]
    return f"### {name}\n\n```python\n{code}\n```\n\n{notes}"


def _others(others: Mapping[str, str]) -> Iterator[str]:
    if others:
        rows = ((f"`{path}`", about) for path, about in others.items())
        yield (
            "## Other exports in this folder\n\nThey were written before. Nothing here is said of "
            f"them.\n\n{_table(('file', 'of'), rows)}"
        )


def _features(trained: TrainedModel) -> str:
    return f"{trained.model.net.num_features:,}"


def _licence() -> str:
    return (
        "## Licence\n\nNone is stated. What may be done with these weights follows from the images "
        "that they were trained on, and from the weights that the training began with, if any. Put "
        "your choice into `license:` at the top before you publish them."
    )


def _training(trained: TrainedModel) -> str:
    values = trained.config.model_dump(mode="json", exclude_defaults=True)
    kept = {name: dict(values[name]) for name in _SECTIONS if values.get(name)}
    kept["data"] = {
        name: value for name, value in values["data"].items() if name in ("image_size", "augment")
    }
    kept.get("model", {}).pop("init_from", None)
    kept.get("head", {}).pop("init_from", None)
    kept.get("head", {}).pop("bank", None)
    text = OmegaConf.to_yaml(OmegaConf.create(kept)).strip()
    return f"## How it was trained\n\n```yaml\n{text}\n```"
