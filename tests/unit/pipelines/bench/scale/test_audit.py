"""The benchmark of an audit: it is killed in each stage once, and still finds the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mhe_dist.errors import RunError, UserError
from pipelines.audit.findings import read_findings
from pipelines.bench.scale import audit
from pipelines.shards.index import ShardIndex


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object], list[int]]:
    folder, ended = tmp_path_factory.mktemp("bench"), []
    lines = audit.measure_audit(folder, 10_000, 32, lambda done, total: ended.append(done))
    return folder, lines, ended


@pytest.mark.slow
def test_it_is_killed_in_each_stage_and_finds_the_same(measured) -> None:
    folder, lines, ended = measured
    assert ended == list(range(1, 3 + len(audit.KILLED)))
    seconds, memory, killed, differences = lines
    assert (seconds.bound, memory.bound, differences.bound) == (600, 4, 0)
    assert seconds.figure > 0 and memory.figure > 0.01 and killed.figure > 1
    assert differences.holds
    found = [read_findings(str(folder / name)) for name in ("peaceful", "killed")]
    assert (found[0]["kind"] == found[1]["kind"]).all()


@pytest.mark.slow
def test_what_is_audited_has_the_faults_that_it_finds(measured) -> None:
    folder = measured[0]
    index = ShardIndex.load(str(folder / "shards"))
    labels = np.load(folder / "labels.npy")
    assert (index.labels_of(np.arange(index.samples)) == labels).all()
    assert index.samples == 10_000 and index.num_classes == 1_000 + 50 - 25
    kinds = read_findings(str(folder / "peaceful"))["kind"]
    assert {"duplicate_classes", "wrong_label", "foreign"} <= set(kinds)
    wrong = (kinds == "wrong_label").sum()
    assert 0.85 * 980 < wrong < 1.1 * 980  # a tenth of those that show a class


def test_findings_that_differ_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter([audit._Ended(1.0, 1, ""), audit._Ended(1.0, 1, "strays"), audit._Ended(1, 1, "")])

    def pretend(folder: Path, name: str, kill_in: object) -> audit._Ended:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / audit.FINDINGS_FILE).write_text(name)
        return next(ends)

    monkeypatch.setattr(audit, "_audit", pretend)
    monkeypatch.setattr(audit, "write_synthetic_set", lambda *_: None)
    monkeypatch.setattr(audit, "KILLED", ("strays",))
    line = audit.measure_audit(tmp_path, 10_000, 32)[-1]
    assert line.figure == 1 and not line.holds


def test_a_stage_that_never_comes_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "_audit", lambda *_: audit._Ended(1.0, 1, ""))
    monkeypatch.setattr(audit, "write_synthetic_set", lambda *_: None)
    with pytest.raises(RunError, match="no stage first_cut, centres"):
        audit.measure_audit(tmp_path, 10_000, 32)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--folder .* are free, .* images need"):
        audit.measure_audit(tmp_path, 10**12, 512)
    assert list(tmp_path.iterdir()) == []
