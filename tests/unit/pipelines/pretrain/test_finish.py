"""What a run leaves behind at its end."""

from __future__ import annotations

from mhe_dist.config.schema import Config
from mhe_dist.tracking.base import PICTURE
from pipelines.evaluate.heldout import Evaluation
from pipelines.pretrain.finish import run_note
from pipelines.report.plots import NOTE_PICTURE


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
