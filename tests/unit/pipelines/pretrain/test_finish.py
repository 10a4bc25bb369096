"""What a run leaves behind at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mhe_dist.backbone.model import build_backbone
from mhe_dist.config.schema import Config
from mhe_dist.tracking.base import PICTURE
from pipelines.evaluate.heldout import Evaluation
from pipelines.pretrain import finish
from pipelines.pretrain.finish import run_note
from pipelines.report.plots import NOTE_PICTURE
from tests.support import tiny


def test_the_note_has_the_main_figures_and_says_how_they_came_about() -> None:
    config = Config.model_validate({"data": {"shards": "a"}})
    metrics = {"tar@far=1e-3": 0.5, "rank1": 0.8634, "chance": 0.002, "gallery": 500.0}
    note = run_note(config, 3300, 29812, Evaluation(metrics, {}, "enrolled: the first image"))
    rows = [line for line in note.splitlines() if line.startswith("| ")][2:]
    assert rows == ["| rank1 | 86.34 % |", "| chance | 0.20 % |", "| tar@far=1e-3 | 50.00 % |"]
    assert "3,300 steps over epochs of 29,812 images" in note and "first image" in note
    (picture,) = PICTURE.finditer(note)
    assert picture["path"] == f"plots/{NOTE_PICTURE}"
    assert "held-out" not in run_note(config, 1, 2, Evaluation({}, {}))


def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Any]:
    """The formats that the end of a run writes, each as a file of its name; the run."""
    config = tiny.config(
        *(tmp_path / "runs", "unused"),
        export={"formats": ["timm", "onnx"]},
        tracking={"mlflow": True, "uri": "unused"},
    )
    model = build_backbone(config.model, config.data.image_size)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    run = mock.MagicMock(config=config, index=mock.Mock(digest="", num_classes=2, samples=2))
    run.recorder.warnings, run.progress.step, run.samples = [], 7, 2

    def write(name: str, trained: object, folder: str, images: object) -> tuple[str, float]:
        path = Path(folder, name)
        path.write_text("exported")
        return str(path), 0.0

    monkeypatch.setattr(finish, "write_format", write)
    monkeypatch.setattr(finish, "write_mlflow_model", lambda onnx, folder, *_: Path(folder).mkdir())
    monkeypatch.setattr(finish, "first_good_images", lambda *_, **__: torch.zeros(1, 3, 8, 8))
    exports = finish._export(run, state, Evaluation({}, {}), lambda path: path)
    assert exports is not None
    return list(exports), run


@pytest.mark.parametrize(
    ("theirs", "written", "left_out", "in_mlflow"),
    [
        ("notes.txt", ["timm", "onnx"], "", True),
        ("backbone.onnx", ["timm"], "backbone.onnx there was not written by mhe", False),
        ("mlflow/mine", ["timm", "onnx"], "mlflow/ there was not written by mhe", False),
        ("README.md", [], "README.md there was not written by mhe", False),
    ],
)
def test_the_end_of_a_run_replaces_exports_and_no_files_of_others(
    theirs: str,
    written: list[str],
    left_out: str,
    in_mlflow: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`mhe export` refused what the end of a run, unasked, replaced."""
    folder = tmp_path / "runs" / "run" / "export"
    (folder / theirs).parent.mkdir(parents=True)
    (folder / theirs).write_text("of the user")
    exports, run = export(tmp_path, monkeypatch)
    assert exports == written
    assert (folder / theirs).read_text() == "of the user"
    warned = [call.args[1] for call in run.recorder.warn.call_args_list]
    assert all(
        left_out in text and f"mhe export {run.config.run.path} --to" in text for text in warned
    )
    assert bool(warned) == bool(left_out)
    assert run.tracker.model.called == in_mlflow
