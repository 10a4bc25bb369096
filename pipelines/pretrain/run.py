"""The parts of a run on one rank, put together, and its loop with records and checkpoints."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mhe_dist.checkpoint.store import Checkpoint, CheckpointStore
from mhe_dist.config.schema import Config
from mhe_dist.config.write import save_config
from mhe_dist.distributed.failures import decided_by_first, failing_together
from mhe_dist.distributed.topology import Topology
from mhe_dist.engine.engine import Engine
from mhe_dist.engine.settings import resolve_head_matmul
from mhe_dist.errors import Preempted, RunError, UserError, first_line
from mhe_dist.heads.base import Head
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from mhe_dist.redact import masked
from mhe_dist.tracking.base import Tracker
from mhe_dist.tracking.environment import device_name, environment_tags
from mhe_dist.tracking.factory import open_tracker
from mhe_dist.train import schedule
from mhe_dist.train.divergence import Guard
from mhe_dist.train.loop import Loop, Request, StepInfo
from pipelines.data.bad_samples import BadSamples, BadSampleTally
from pipelines.data.mixture.index import label_digests, open_training_index, samples_per_epoch
from pipelines.evaluate.heldout import Evaluation
from pipelines.evaluate.in_training import (
    TrainedHead,
    evaluate_in_training,
    refuse_unusable_sets,
)
from pipelines.loader.loader import Loader
from pipelines.pretrain import garbage, preemption
from pipelines.pretrain.checkpointing import Checkpointer, retention_policy
from pipelines.pretrain.recorder import EventHandler, Recorder, doubtful_settings, tracked_datasets
from pipelines.pretrain.restarts import Restart, RunProgress, read_restart, read_skipped_steps
from pipelines.runs.auto_sizes import settle_sizes
from pipelines.runs.first_model import make_tried_model, without_first_weights
from pipelines.runs.resume import record_changes, refuse_changed_config, refuse_other_data
from pipelines.runs.warm_start import (
    HEAD_PREFIX,
    NO_DATA_DIGEST,
    load_initial_rows,
    read_head_state,
    refuse_other_num_classes,
)


class Run:
    """The parts of a run on one rank, put together."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        on_event: EventHandler,
        check_lock: Callable[[], None] = lambda: None,
        classes: int | None = None,
    ) -> None:
        """Args:
        config: of the run.
        topology: the ranks.
        on_event: see `Recorder`.
        check_lock: raises when the run's folder is another process's now.
        classes: of the head; None: those of the data.
        """
        # What is read of the run, one rank reads for all: they must find the same.
        self.changes = decided_by_first(lambda: refuse_changed_config(config), topology)
        self.index = open_training_index(config.data, config.run.seed)
        sizes = (config, self.index.num_classes, topology.world_size)
        head = decided_by_first(lambda: settle_sizes(*sizes).head, topology)
        config = config.model_copy(update={"head": head})
        self.config, self.topology, self.check_lock = config, topology, check_lock
        self.samples = samples_per_epoch(self.index)
        self.total_steps = schedule.total_steps(config, self.samples)
        self.store = CheckpointStore(
            f"{config.run.path}/checkpoints", topology, retention_policy(config.checkpoint)
        )
        checkpoint = self.store.newest()
        begun = config if checkpoint is None else without_first_weights(config)
        self.engine = Engine(
            make_tried_model(begun, topology, self.index),
            *(config.optim, config.train, topology, int(config.scale.zero_stage), config.run.seed),
        )
        self.head = self._make_head(classes or self.index.num_classes)
        self.trained_head = TrainedHead(self.head, self.index)
        self.loop = Loop(
            self.engine,
            self.head,
            topology,
            config.train.micro_batch,
            lambda step: schedule.learning_rate(step, self.total_steps, config.optim),
            self._request,
        )
        self.versions = environment_tags()
        self.restart = Restart(time.time())
        self.progress, run_id, bad_samples = self._restore(checkpoint)
        at = (f"{config.run.path}/metrics.jsonl", self.progress.step, self.restart.began)
        self.restart = decided_by_first(lambda: read_restart(*at), topology)
        self.bad_samples = BadSamples(topology, config.run.path, bad_samples)
        with failing_together(topology):
            self.tracker = self._open_tracker(run_id)
        self.recorder = Recorder(
            topology, self.tracker, on_event, self.loop.head_time, config.train.audit_every
        )
        self.guard = Guard(config.guard, config.optim.clip_norm)
        self.checkpointer = Checkpointer(config.checkpoint, self.store, self.recorder)

    def train(self) -> None:
        """The remaining steps, with records, evaluations and checkpoints between them."""
        if self.progress.step < self.total_steps:
            self._refuse_unusable_sets()
        self.recorder.emit(
            "start",
            run=self.config.run.path,
            step=self.progress.step,
            steps=self.total_steps,
            resumed_from=self.progress.resumed_from,
            lost_steps=self.restart.lost_steps,
            passed_over=self.store.rejected,
            classes=self.index.num_classes,
            samples=self.samples,
            precision=self.engine.precision,
        )
        if self.changes:
            changes = {key: [old, new] for key, old, new in self.changes}
            self.recorder.emit("settings_changed", step=self.progress.step, changes=changes)
        precisions = (self.progress.precision, self.engine.precision)
        device, classes = self.topology.device, self.index.num_classes
        for message in doubtful_settings(self.config, classes, device, *precisions):
            self.recorder.warn(self.progress.step, message)
        if self._evaluation_due(self.progress.step) and self._resumes_unscored():
            self._evaluate_again()
        batches = self.open_loader(self.progress.step, self.total_steps)
        skipped = read_skipped_steps(self.config.run.path, self.topology) - {self.total_steps - 1}
        steps = self.loop.steps(batch for batch in batches if batch.step not in skipped)
        with batches.reporting_dead_workers(), garbage.of_new_objects():
            for info in self.restart.recorded(self.progress.step, steps, self.recorder):
                self.recorder.add_step(info)
                self.progress.step = info.step + 1
                self._after_step(info, batches.faults)
        self.checkpointer.wait()

    def evaluate(self, with_pictures: bool = False) -> Evaluation:
        """Held-out results of the model as it is now; the metrics are the same on all ranks.

        Args:
            with_pictures: see `pipelines.evaluate.heldout.evaluate_heldout`.

        Raises:
            Preempted: a rank was told to stop meanwhile; nothing is recorded.
        """
        config = self.config
        if not config.evaluate.has_sets:
            return Evaluation({}, {})
        with self.recorder.phase("evaluate"):
            evaluation = evaluate_in_training(
                self._embed,
                config.evaluate,
                config.data,
                config.run.seed,
                self.topology,
                self.trained_head,
                with_pictures,
            )
        step = self.progress.step
        known = self.restart.heldout if step == self.restart.step else {}
        self.recorder.record_evaluation(step, evaluation.metrics, known)
        return evaluation

    def try_to_evaluate(self, with_pictures: bool = False) -> Evaluation | None:
        """Like `evaluate`, but one that fails is a warning; None stands for it.

        What is trained is worth more. It fails on all ranks, so that all go on
        (`mhe_dist.distributed.failures`).
        """
        try:
            return self.evaluate(with_pictures)
        except (UserError, RunError, OSError) as error:
            step, path = self.progress.step, shlex.quote(self.config.run.path)
            self.recorder.warn(
                step,
                f"the evaluation after step {step} failed: {first_line(error)}; mend that, then: "
                f"mhe evaluate {path}",
            )
            return None

    def _evaluate_again(self) -> None:
        """What the process before did not end; its checkpoint gets the figures."""
        if self.try_to_evaluate() is not None:
            step = self.progress.step
            self.store.add_scores(step, self.recorder.scores(step))

    def _refuse_unusable_sets(self) -> None:
        """What would make an evaluation fail hours later is said now."""
        config = self.config
        if config.evaluate.has_sets:
            refuse_unusable_sets(
                config.evaluate,
                config.data,
                config.run.seed,
                self.topology,
                self.index.num_classes,
            )

    def save(self, faults: BadSampleTally) -> None:
        """Checkpoint what a resumed run needs; written while training goes on.

        Args:
            faults: the bad samples that this rank met since the process began.
        """
        self._flush()  # what a resumed run will not do again is on record, and is sound
        with self.recorder.phase("checkpoint"):
            self.bad_samples.gather(faults)
            head = self.head.state().with_prefix(HEAD_PREFIX)
            self.checkpointer.save(
                self.progress.step,
                self.engine.entries() | head.replicated,
                head.owned,
                self._description(),
            )

    def stop_if_requested(self, when: str) -> None:
        """Stop where nothing is to be saved; all ranks must call.

        Args:
            when: what the run does now, in words.

        Raises:
            Preempted: a rank was told to stop.
        """
        if preemption.requested_of_any(self.topology):
            raise Preempted(f"told to stop {when}; {self.standing()}")

    def standing(self) -> str:
        """What a resumed run begins with, in words."""
        step = self.progress.step
        return f"the checkpoint of step {step} stands" if step else "there was nothing to save"

    def _embed(self, images: Tensor) -> Tensor:
        self.stop_if_requested("while it evaluated")
        return self.engine.embed(images)

    def _evaluation_due(self, done: int) -> bool:
        """Whether the model is to be evaluated between two steps."""
        every = self.config.evaluate.every_steps
        return every > 0 and done % every == 0 and done < self.total_steps

    def _resumes_unscored(self) -> bool:
        """Whether the process before was told to stop in the evaluation that is due."""
        return self.progress.resumed_from is not None and not self.progress.scored

    def _after_step(self, info: StepInfo, faults: BadSampleTally) -> None:
        done, config = self.progress.step, self.config
        last = done == self.total_steps
        stopping = Request.STOP in info.requested and not last
        if done % config.train.log_every == 0 or last:
            self._flush()
        if self._epochs(done) > self._epochs(done - 1) or last:
            self.bad_samples.gather(faults)
            self.recorder.record_bad_samples(done, self.bad_samples.total)
        evaluated = False
        if self._evaluation_due(done) and not stopping:
            try:
                evaluated = self.try_to_evaluate() is not None
            except Preempted:  # told to stop meanwhile; the resumed run evaluates
                stopping = True
        if self.checkpointer.due(done, evaluated) or info.requested or stopping or last:
            self.save(faults)
        self.checkpointer.poll()
        if stopping:
            self.checkpointer.wait()
            said = [self.checkpointer.status, self.tracker.problem]
            raise Preempted(f"told to stop after step {done}; {'; '.join(filter(None, said))}")

    def _request(self) -> Request:
        """What this rank asks of all: rank 0's clock decides on saves, anybody may be preempted."""
        self.check_lock()
        overdue = self.topology.is_first and self.checkpointer.overdue()
        save = Request.SAVE if overdue else Request.NOTHING
        return save | Request.STOP if preemption.requested() else save

    def _flush(self) -> None:
        """Record the window of steps, and see whether they were sound."""
        for message in self.guard.check(self.recorder.flush()):
            self.recorder.warn(self.progress.step, message)
        self.report_tracker()

    def report_tracker(self) -> None:
        """Say on the first rank, once, that the tracker gave up."""
        if (problem := self.tracker.problem) and problem not in self.recorder.warnings:
            self.recorder.warn(self.progress.step, problem)

    def _epochs(self, steps: int) -> int:
        return schedule.epochs_ended(self.config, self.samples, steps)

    def open_loader(self, start_step: int, stop_step: int) -> Loader:
        """The batches of some steps, this rank's micro-batches of them."""
        train = self.config.train
        return Loader(
            self.index,
            self.config.data,
            global_batch=train.global_batch,
            micro_batches=train.micro_batches,
            local_micro_batches=self.topology.share(train.micro_batches),
            start_step=start_step,
            stop_step=stop_step,
            seed=self.config.run.seed,
        )

    def _description(self) -> dict[str, Any]:
        return {
            "step": self.progress.step,
            "images": self.progress.images + self.recorder.images,
            "bad_samples": self.bad_samples.state(),
            "config": masked(self.config.model_dump(mode="json")),
            "data_digest": self.index.digest,
            "labels": label_digests(self.index),
            "classes": self.index.num_classes,
            "samples": self.samples,
            "precision": self.engine.precision,
            "row_ranges": self.head.row_ranges(),
            "run_id": self.tracker.run_id,
            "scores": self.recorder.scores(self.progress.step),
            "versions": self.versions,
        }

    def _make_head(self, classes: int) -> Head:
        config, device = self.config, self.topology.device
        spec = HeadSpec(
            config.head,
            classes,
            config.model.embedding_dim,
            config.run.seed,
            config.train.micro_batches,
            folder=config.head.bank.path or f"{config.run.path}/bank",
            epoch_steps=self.samples / config.train.global_batch,
            steps=self.total_steps,
            tf32=resolve_head_matmul(config.head.matmul, self.engine.precision, device),
        )
        return build_head(spec, self.topology)

    def _restore(
        self, checkpoint: Checkpoint | None
    ) -> tuple[RunProgress, str | None, dict[str, Any] | None]:
        """How far the run is, its MLflow run, and its bad samples so far."""
        if checkpoint is None:
            load_initial_rows(self.config, self.head, self.topology)
            return RunProgress(), None, None
        found = decided_by_first(lambda: checkpoint.run, self.topology)
        if found["data_digest"] == NO_DATA_DIGEST:
            refuse_other_num_classes(found["classes"], self.index, self.config)
        else:
            refuse_other_data(found, self.index.digest, label_digests(self.index), self.config)
        if self.total_steps < found["step"]:
            raise UserError(
                f"{self.config.run.path} has done {found['step']} steps, but train.epochs and "
                f"train.max_steps give {self.total_steps} now: give at least as many"
            )
        self._load(checkpoint)
        scored = decided_by_first(lambda: bool(checkpoint.scores), self.topology)
        precision = found.get("precision")
        progress = RunProgress(found["step"], found["images"], checkpoint.path, scored, precision)
        return progress, found["run_id"], found.get("bad_samples")

    def _load(self, checkpoint: Checkpoint) -> None:
        backbone = checkpoint.load_together(
            lambda name: not name.startswith(HEAD_PREFIX), self.topology
        )
        self.engine.load_state(backbone)
        del backbone
        with failing_together(self.topology):
            rows = read_head_state(self.head, checkpoint)
        self.head.load_state(rows)

    def _open_tracker(self, run_id: str | None) -> Tracker:
        if self.topology.is_first:
            record_changes(self.config.run.path, self.progress.step, self.changes)
            save_config(self.config, f"{self.config.run.path}/config.yaml")
        tracker = open_tracker(self.config, self.topology.is_first, run_id)
        tags = self.versions | {
            "data_digest": self.index.digest,
            **{f"{key}.digest": value for key, value in label_digests(self.index).items()},
            "world_size": str(self.topology.world_size),
            "device": device_name(self.topology.device),
            "precision": self.engine.precision,
            "checkpoints": f"{self.config.run.path}/checkpoints",
        }
        tracker.start(self.config.model_dump(mode="json"), tags, self.progress.step)
        if self.topology.is_first:
            for dataset in tracked_datasets(self.config, self.index, self.samples):
                tracker.dataset(dataset)
        return tracker
