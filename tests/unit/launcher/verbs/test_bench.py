"""Mistakes in the options of `mhe bench`, found before anything is measured."""

from __future__ import annotations

import pytest

from launcher import cli


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--backbone", "iresnet19"], "--backbone iresnet19: timm has no such model"),
        (["train", "--precision", "fp16"], "Invalid value for '--precision'"),
        (["classifier", "--classes", "10", "--top", "50"], "--top 50: there are 10 classes"),
        (["classifier", "--kinds", "mhs"], "--kinds mhs: there is full, mhp, mhc"),
        (["head", "--kinds", "fll"], "--kinds fll: there is full"),
    ],
)
def test_mistakes_in_options(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", *words]) == 2
    assert says in capsys.readouterr().err
