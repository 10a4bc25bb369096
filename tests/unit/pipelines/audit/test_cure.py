"""From findings to a label set, and what a person decided about them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from mhe_dist.errors import UserError
from pipelines.audit import cure
from pipelines.audit.cure import cure_labels, parse_actions
from pipelines.audit.findings import (
    COLUMNS,
    Findings,
    join_findings,
    make_findings,
    read_decisions,
    read_findings,
    write_findings,
)

ALL = ("merge", "split", "relabel", "drop")
LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, -1], np.int32)


@pytest.fixture
def findings() -> Findings:
    """Classes 0 and 1 are one; of class 2 two images are another; two strays and a copy."""
    return join_findings(
        [
            make_findings(
                *("duplicate_classes", 1),
                **dict(class_=0, neighbour_class=1, score=1.0, probability=0.9, group=0),
                action="merge",
            ),
            make_findings("mixed_class", 2, sample=[7, 8], class_=2, group=1, action="split"),
            make_findings(
                *("wrong_label", 1),
                **dict(sample=[4], class_=1, neighbour_class=3, action="relabel", key="a,b"),
            ),
            make_findings("foreign", 1, sample=[10], class_=3, action="drop"),
            make_findings("repeated", 1, sample=[1], class_=0, neighbour_sample=0),
        ]
    )


def test_findings_are_applied(findings: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    cured = cure_labels(LABELS, 4, findings, ALL)
    assert cured.labels.tolist() == [0, 0, 0, 0, 2, 1, 1, 3, 3, 2, -1, -1]
    assert cured.num_classes == 4
    assert cured.sources.tolist() == [0, 2, 3, 2] and cured.parts.tolist() == [0, 0, 0, 1]
    assert list(cured.names(["a", "b", "c", "d"])) == ["a", "c", "d", "c (2)"]
    assert list(cured.names(["a", "c (2)", "c", "d"])) == ["a", "c", "d", "c (3)"]
    assert cured.applied == {"merge": 1, "split": 2, "relabel": 1, "drop": 1}
    for together, parts in ((1 << 20, 1), (5, 3)):
        monkeypatch.setattr(cure, "_PART", together)
        lists = list(cured.lists())
        assert len(lists) == parts
        assert np.concatenate([each.counts for each in lists]).tolist() == [1] * 10 + [0, 0]
        ids = np.concatenate([each.class_ids for each in lists])
        assert ids.tolist() == cured.labels[:10].tolist()


@pytest.mark.parametrize(
    ("actions", "labels"),
    [
        ((), [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, -1]),
        (("merge",), [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, -1]),
        (("relabel", "drop"), [0, 0, 0, 1, 3, 2, 2, 2, 2, 3, -1, -1]),
    ],
)
def test_only_what_is_asked_for_is_applied(
    findings: Findings, actions: tuple[str, ...], labels: list[int]
) -> None:
    assert cure_labels(LABELS, 4, findings, actions).labels.tolist() == labels


def test_actions_are_named() -> None:
    assert parse_actions("merge, drop") == ("merge", "drop") and parse_actions("") == ()
    with pytest.raises(
        UserError, match="--apply merge,fix: 'fix' is no action; choose among merge"
    ):
        parse_actions("merge,fix")


def test_findings_come_back_from_their_file(findings: Findings, tmp_path: Path) -> None:
    write_findings(str(tmp_path), findings)
    again = read_findings(str(tmp_path))
    for name in COLUMNS:
        assert again[name].tolist() == findings[name].tolist()
    with pytest.raises(UserError, match="no findings of mhe audit"):
        read_findings(f"{tmp_path}/nowhere")


def test_names_that_are_no_utf8_are_spelled_out_in_both_files(tmp_path: Path) -> None:
    """Tars may hold any bytes; the audit failed after all its work."""
    name = b"caf\xe9".decode(errors="surrogateescape")
    texts = "key", "class_name", "neighbour_name", "neighbour_key", "neighbour_set"
    write_findings(
        str(tmp_path), make_findings("wrong_label", 1, sample=4, **dict.fromkeys(texts, name))
    )
    again = read_findings(str(tmp_path))
    assert [again[text].tolist() for text in texts] == [["caf\\udce9"]] * len(texts)
    with open(tmp_path / "decisions.csv", newline="", encoding="utf-8") as stream:
        (row,) = csv.DictReader(stream)
    assert [row[text] for text in texts] == ["caf\\udce9"] * len(texts)
    decided = read_decisions(str(tmp_path / "decisions.csv")).match(again)
    assert decided.tolist() == [""], "its rows are those of the findings"


def decide(folder: Path, findings: Findings, **decisions: str) -> str:
    """decisions.csv with a decision for all rows of a kind."""
    write_findings(str(folder), findings)
    path = folder / "decisions.csv"
    with open(path, newline="") as stream:
        rows = list(csv.DictReader(stream))
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {"decision": decisions.get(row["kind"], "")})
    return str(path)


def test_what_is_rejected_is_not_applied(findings: Findings, tmp_path: Path) -> None:
    path = decide(
        tmp_path, findings, duplicate_classes="reject", foreign=" Reject", repeated="accept"
    )
    decided = read_decisions(path).match(findings)
    assert decided.tolist() == ["reject", "", "", "", "reject", "accept"]
    cured = cure_labels(LABELS, 4, findings, ALL, decided)
    assert cured.labels.tolist() == [0, 0, 0, 1, 3, 2, 2, 4, 4, 3, 3, -1]


def test_decisions_come_back_from_a_spreadsheet(tmp_path: Path) -> None:
    given = {"sample": [1], "neighbour_sample": 0, "neighbour_set": "=sets/a"}
    names = {"key": "007", "neighbour_key": "008", "class_name": "=1+1"}
    findings = make_findings("leak", 1, **given, **names)
    write_findings(str(tmp_path), findings)
    path = tmp_path / "decisions.csv"
    text = path.read_text()
    assert ",'=1+1," in text and ",'=sets/a," in text, "a spreadsheet would run them"
    text = text.replace("007", "7").replace("008", "8").replace(",\n", ",reject\n")
    path.write_text("\ufeff" + text.replace(",", ";").replace("\n", "\r\n"), encoding="utf-8")
    assert read_decisions(str(path)).match(findings).tolist() == ["reject"]


def test_decisions_about_something_else_are_refused(findings: Findings, tmp_path: Path) -> None:
    path = decide(tmp_path, findings, foreign="maybe")
    with pytest.raises(UserError, match="line 6: decision is 'maybe'; write accept or reject"):
        read_decisions(path)
    path = decide(tmp_path, findings)
    with pytest.raises(
        UserError, match=r"line 6: this is no finding of this audit \(foreign, sample"
    ):
        read_decisions(path).match(findings.of(findings["kind"] != "foreign"))
    Path(path).write_text("kind,sample\n")
    with pytest.raises(UserError, match="has no column 'class'"):
        read_decisions(path)
    with pytest.raises(UserError, match="cannot be opened"):
        read_decisions(f"{tmp_path}/none.csv")
