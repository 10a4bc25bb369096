"""What a run warns of and lives with, evaluations that fail among it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mhe_dist.checkpoint.reader import Checkpoint
from mhe_dist.checkpoint.step_folder import list_steps
from mhe_dist.errors import Preempted, RunError
from mhe_dist.tracking.base import NullTracker
from pipelines.evaluate.heldout import Evaluation
from pipelines.pretrain import run as run_module
from pipelines.pretrain.main import run_pretraining
from tests.support import tiny


class Refused(NullTracker):
    problem = "MLflow refuses values: the experiment was deleted"


@pytest.mark.slow
def test_a_finished_training_is_exported_whatever_else_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RunError("lfw.bin: image 3 cannot be decoded")

    monkeypatch.setattr(run_module, "evaluate_in_training", fail)
    monkeypatch.setattr(run_module, "open_tracker", lambda *_: Refused())
    config = tiny.config(
        tmp_path,
        tiny.write_shards(tmp_path / "one", classes=1),
        head={"kind": "full", "groups": 1},
        train={"max_steps": 2, "global_batch": 8, "micro_batch": 8},
        evaluate={"verification": [tiny.write_bin(tmp_path / "lfw.bin")], "every_steps": 1},
        export={"formats": ["timm"]},
    )
    events: list[dict[str, Any]] = []
    summary = run_pretraining(config, events.append)
    said = summary["warnings"]
    assert [event["message"] for event in events if event["event"] == "warning"] == said
    failed = "the evaluation after step {} failed: lfw.bin: image 3 cannot be decoded; mend that, "
    expected = ["there is one class only", failed.format(1), "loss of step 0 is exactly 0"]
    expected += ["was deleted", failed.format(2)]
    for part, message in zip(expected, said, strict=True):
        assert part in message
    assert Path(summary["exports"]["timm"]["path"], "model.safetensors").exists()
    assert summary["heldout"] == {}


@pytest.mark.slow
def test_an_evaluation_done_again_gives_its_checkpoint_the_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told_to_stop(*_: Any) -> None:
        raise Preempted("told to stop while it evaluated")

    config = tiny.config(
        tmp_path,
        tiny.write_shards(tmp_path / "two", classes=2),
        head={"kind": "full", "groups": 1},
        train={"max_steps": 2, "global_batch": 8, "micro_batch": 8},
        evaluate={"verification": [tiny.write_bin(tmp_path / "lfw.bin")], "every_steps": 1},
        export={"formats": []},
    )
    with monkeypatch.context() as patches:
        patches.setattr(run_module, "evaluate_in_training", told_to_stop)
        with pytest.raises(Preempted):
            run_pretraining(config)
    checkpoint = Checkpoint(f"{config.run.path}/checkpoints/step_00000001", 1)
    assert checkpoint.scores == {}
    run_pretraining(config)
    assert checkpoint.scores["lfw/accuracy"] > 0


@pytest.mark.slow
def test_the_last_model_may_stay_as_the_best_when_its_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint had no score: it is evaluated when it is written."""
    figures = iter([0.1, 0.9, 0.2, 0.3])  # after 2 and 3 steps; after 4 and 5

    def evaluate(*_: Any) -> Evaluation:
        return Evaluation({"lfw/accuracy": next(figures)}, {})

    monkeypatch.setattr(run_module, "evaluate_in_training", evaluate)
    shards = tiny.write_shards(tmp_path / "two", classes=2)
    for steps in (3, 5):
        config = tiny.config(
            *(tmp_path, shards),
            head={"kind": "full", "groups": 1},
            train={"max_steps": steps, "global_batch": 8, "micro_batch": 8},
            evaluate={"verification": [tiny.write_bin(tmp_path / "lfw.bin")], "every_steps": 2},
            checkpoint={"keep_best": "lfw/accuracy", "keep_last": 1},
            resume={"allow": ["train.max_steps"]},
            export={"formats": []},
        )
        run_pretraining(config)
    assert list_steps(f"{config.run.path}/checkpoints") == [5, 3]
