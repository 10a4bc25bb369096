"""The end of a run: the last evaluation, the exported backbone, pictures and the summary."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from mhe_dist.atomic_file import write_file
from mhe_dist.backbone.model import restore_backbone
from mhe_dist.config.schema import Config
from mhe_dist.distributed.failures import decided_by_first
from mhe_dist.errors import Preempted
from mhe_dist.redact import masked
from mhe_dist.storage_retry import errors_naming
from mhe_dist.tracking.environment import device_name
from mhe_dist.tracking.factory import mlflow_uri
from pipelines.data import bad_samples
from pipelines.data.mixture.index import label_digests
from pipelines.data.sequential import first_good_images
from pipelines.evaluate.heldout import Evaluation
from pipelines.pretrain import preemption
from pipelines.pretrain.run import Run
from pipelines.serving.exports import MLFLOW_FOLDER, write_format
from pipelines.serving.mlflow_model import write_mlflow_model
from pipelines.serving.model_card import TrainedModel, write_model_card
from pipelines.serving.output_folder import foreign_files, staged_export
from pipelines.storage.urls import local_copies

PARITY_IMAGES = 64

Copied = Callable[[str], str]
"""See `pipelines.storage.urls.local_copies`."""


def finish_run(run: Run) -> dict[str, Any]:
    """Evaluate, export, draw and sum up; all ranks must call and all get the summary.

    Raises:
        Preempted: a rank was told to stop during the evaluation, or the first between two exports;
            a run that is started again does all of this anew.
    """
    run.check_lock()
    run.recorder.flush()
    evaluation = run.try_to_evaluate(with_pictures=True) or Evaluation({}, {})
    if evaluation.metrics:  # whoever lets the run go on may keep this model as the best
        run.store.add_scores(run.progress.step, evaluation.metrics)
    tensors = run.engine.state()
    with local_copies() as copied:  # MLflow reads them until the tracker is closed
        exports = decided_by_first(
            lambda: _write_results(run, tensors, evaluation, copied), run.topology
        )
        if exports is None:
            raise Preempted(f"told to stop while it exported; {run.standing()}")
        run.tracker.close()  # what does not arrive belongs in the summary
    run.report_tracker()
    summary = _summary(run, evaluation, exports)
    if run.topology.is_first:
        with _errors_naming_run(run):
            write_file(f"{run.config.run.path}/summary.json", json.dumps(summary, indent=2))
        run.recorder.emit("end", summary=summary)
    return summary


def _write_results(
    run: Run, tensors: dict[str, Tensor], evaluation: Evaluation, copied: Copied
) -> dict[str, dict[str, Any]] | None:
    """Exports, pictures and the note of the record; what `_export` gives."""
    with _errors_naming_run(run):
        with run.recorder.phase("export"):
            exports = _export(run, tensors, evaluation, copied)
        if exports is not None:
            with run.recorder.phase("report"):
                _draw(run, evaluation, copied)
            run.tracker.note(run_note(run.config, run.progress.step, run.samples, evaluation))
    return exports


def _errors_naming_run(run: Run) -> AbstractContextManager[None]:
    """A disk or a store that refuses results says neither whose they are nor what is lost."""
    return errors_naming(
        run.config.run.path,
        "its results cannot be written",
        "; the run is trained: mend that, and the same command writes them",
    )


def _export(
    run: Run, tensors: dict[str, Tensor], evaluation: Evaluation, copied: Copied
) -> dict[str, dict[str, Any]] | None:
    """What was written, by format; None: this rank was told to stop."""
    config = run.config
    about = {
        "data_digest": run.index.digest,
        "classes": run.index.num_classes,
        "samples": run.samples,
    }
    trained = TrainedModel(
        restore_backbone(config.model, config.data.image_size, tensors),
        config,
        run.progress.step,
        about,
        evaluation.metrics,
        evaluation.protocol,
    )
    # A bad sample must not end a trained run.
    size, count = config.data.image_size, run.index.samples
    images = first_good_images(run.index, PARITY_IMAGES, size, limit=count)
    folder = f"{config.run.path}/export"
    exports: dict[str, dict[str, Any]] = {}
    for name in config.export.formats:
        if preemption.requested():
            return None
        if _is_taken(run, folder, name):
            continue
        path, difference = write_format(name, trained, folder, images)
        exports[name] = {"path": path, "max_difference": difference}
        run.recorder.emit("export", format=name, path=path, max_difference=difference)
    if preemption.requested():
        return None
    if "onnx" in exports and config.tracking.mlflow:
        made = "mlflow" in exports
        if not made and not _is_taken(run, folder, "mlflow"):
            example = images[0].permute(1, 2, 0).contiguous().numpy()
            with staged_export(folder, MLFLOW_FOLDER, "mlflow", trained, whole=True) as model:
                onnx = copied(exports["onnx"]["path"])
                write_mlflow_model(onnx, model, example, config.model.embedding_dim)
                write_model_card(model, trained, {"mlflow": "."})
            made = True
        if made:
            run.tracker.model(copied(f"{folder}/{MLFLOW_FOLDER}"), config.run.name)
    return exports


def _is_taken(run: Run, folder: str, name: str) -> bool:
    """Whether an export is left out for files of somebody else; a warning says so."""
    if not (found := foreign_files(folder, [name])):
        return False
    message = (
        f"{folder}: {', '.join(found)} there was not written by mhe and stays, and the export "
        f"{name} is left out; move it away, then: mhe export "
        f"{shlex.quote(run.config.run.path)} --to {name}"
    )
    if message not in run.recorder.warnings:
        run.recorder.warn(run.progress.step, message)
    return True


def _draw(run: Run, evaluation: Evaluation, copied: Copied) -> None:
    """Pictures in `<run>/plots`, and what is worth keeping beside them, to MLflow too."""
    from pipelines.report.plots import draw_plots  # matplotlib, which no step needs

    config, path, kept = run.config, run.config.run.path, []
    if evaluation.details:
        evaluation.save(f"{path}/evaluation.npz")
        kept.append("evaluation.npz")
    run.tracker.flush()  # the pictures show every step
    if draw_plots(path, config.evaluate.shards, config.data.image_size):
        kept.append("plots")
    kept.append("config.yaml")
    if run.bad_samples.total.count:
        kept.append(bad_samples.BAD_SAMPLES_FILE)
    for name in kept if config.tracking.mlflow else ():
        run.tracker.artifact(copied(f"{path}/{name}"))


def run_note(config: Config, steps: int, samples: int, evaluation: Evaluation) -> str:
    """The main figures of a run and a picture in Markdown, for the head of its record."""
    lines = [
        f"**{config.model.name}**, head `{config.head.kind}`, {steps:,} steps over epochs of "
        f"{samples:,} images"
    ]
    first = (
        *("rank1", "chance", "accuracy", "classification/top1", "classification/top5"),
        *("labels/p@1", "labels/p@5", "labels/psp@5"),
    )
    rows = [
        (name, f"{100 * evaluation.metrics[name]:.2f} %")
        for name in (*first, *sorted(evaluation.metrics))
        if name in evaluation.metrics and (name in first or name.startswith("tar@"))
    ]
    if rows:
        table = [("held-out figure", "value"), ("---", "---"), *dict(rows).items()]
        lines += ["\n".join(f"| {name} | {value} |" for name, value in table)]
        lines += [f"Protocol: {evaluation.protocol}"] if evaluation.protocol else []
    lines.append("![curves of the run](plots/note.png)")
    lines.append("More pictures: `plots/` of the artifacts; a page: `mhe report`.")
    return "\n\n".join(lines)


def _summary(
    run: Run, evaluation: Evaluation, exports: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Figures of the whole run, and where everything is; without secrets."""
    recorder, progress, config = run.recorder, run.progress, run.config
    seconds = recorder.phases.get("train", 0.0)
    figures = {
        "run": config.run.path,
        "steps": run.total_steps,
        "classes": run.index.num_classes,
        "samples": run.samples,
        "labels": label_digests(run.index),
        "world_size": run.topology.world_size,
        "device": device_name(run.topology.device),
        "precision": run.engine.precision,
        "bad_samples": run.bad_samples.total.count,
        "resumed_from": progress.resumed_from,
        "images_per_s": recorder.images / seconds if seconds else 0.0,
        "phases": {name: round(value, 2) for name, value in recorder.phases.items()},
        "training": recorder.last,
        "heldout": evaluation.metrics,
        "protocol": evaluation.protocol,
        "exports": exports,
        "checkpoints": f"{config.run.path}/checkpoints",
        "failed_checkpoints": run.checkpointer.failures,
        "warnings": recorder.warnings,
        "mlflow": _where_in_mlflow(run) if config.tracking.mlflow else None,
    }
    return dict(masked(figures))


def _where_in_mlflow(run: Run) -> dict[str, str | None]:
    tracker = run.tracker
    return {
        "uri": mlflow_uri(run.config),
        "run_id": tracker.run_id,
        "page": tracker.page,
    }
