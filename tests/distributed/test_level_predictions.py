"""Top-k of Multi-Head Product and Cascade against all classes, or a beam in plain Python."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhe_dist.bank.class_layout import digits
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.multilevel.base import MixedRadix
from mhe_dist.heads.multilevel.product import best_products
from tests.support.heads.head_jobs import CLASSES, STEPS, Job
from tests.support.heads.head_runs import Found, run_all, run_cases
from tests.support.heads.level_jobs import PREDICTIONS, level_config
from tests.support.heads.level_runs import LevelOutcome, define


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda size: f"W={size}")
def found(request: pytest.FixtureRequest, selected: list[str]) -> Found:
    """What each rank found for the jobs of the selected cases."""
    return run_cases(request.param, {name: PREDICTIONS[name] for name in selected})


@pytest.mark.parametrize("case", PREDICTIONS)
def test_best_classes(case: str, found: Found) -> None:
    (job,), (ranks,) = PREDICTIONS[case], found[case]
    classes = torch.cat([rank["classes"] for rank in ranks])
    scores = torch.cat([rank["scores"] for rank in ranks])
    embeddings = job.inputs()[0][STEPS - 1].flatten(0, 1)
    expected = [beam(define(job), x, job) for x in embeddings]
    assert classes.tolist() == [[c for c, _ in best] for best in expected]
    torch.testing.assert_close(
        scores, torch.tensor([[s for _, s in best] for best in expected]).double()
    )


def beam(outcome: LevelOutcome, x: Tensor, job: Job) -> list[tuple[int, float]]:
    """Top-k of an embedding: over all products, or by the cascade's beam; padded with -1."""
    plain, k = outcome.plain, job.predict
    width = max(k, job.config.mhc.candidates) if job.config.kind == "mhc" else job.num_classes
    paths = {0: 0.0}
    for level, length in enumerate(plain.lengths):
        below = [p * length + j for p in paths for j in range(length)]
        below = [c for c in below if c < plain.prefixes(level)]
        if job.config.kind == "mhp":
            rows = plain.used_digits(level)
            scores = plain.log_scores(level, plain.cosines(level, x, rows))
            own = [scores[c % length] for c in below]
        else:
            own = plain.log_scores(level, plain.cosines(level, x, below))
        new = {c: paths[c // length] + float(s) for c, s in zip(below, own, strict=True)}
        paths = dict(sorted(new.items(), key=lambda item: -item[1])[:width])
    return [*list(paths.items())[:k], *[(-1, float("-inf"))] * (k - len(paths))]


def test_a_wide_beam_is_exact() -> None:
    job = Job(level_config("mhc", "three", mhc={"candidates": CLASSES}), predict=5)
    (found,) = run_all(Topology(), [job])
    plain = define(replace(job, predict=0)).plain
    for x, classes in zip(job.inputs()[0][-1].flatten(0, 1), found["classes"], strict=True):
        total = torch.zeros(CLASSES).double()
        for level in range(len(plain.lengths)):
            rows = list(range(plain.prefixes(level)))
            scores = plain.log_scores(level, plain.cosines(level, x, rows))
            total += scores[[y // plain.stride(level) for y in range(CLASSES)]]
        assert classes.tolist() == total.topk(5).indices.tolist()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_best_products_are_exact(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    size = int(torch.tensor(lengths).prod())
    radix = MixedRadix(data.draw(st.integers(1, size)), tuple(lengths))
    k = data.draw(st.integers(1, size + 2))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    used = [min(n, radix.prefixes(level)) for level, n in enumerate(lengths)]
    scores = [torch.randn(3, n, generator=rng, dtype=torch.float64) for n in used]
    found = best_products(scores, radix, k)
    total = torch.zeros(3, radix.num_classes).double()
    for own, digit in zip(scores, digits(torch.arange(radix.num_classes), lengths).T, strict=True):
        total += own[:, digit]
    best, classes = total.topk(min(k, radix.num_classes), dim=1)
    assert found.classes[:, : best.shape[1]].tolist() == classes.tolist()
    torch.testing.assert_close(found.scores[:, : best.shape[1]], best)
    assert (found.classes[:, best.shape[1] :] == -1).all()
    assert (found.scores[:, best.shape[1] :] == float("-inf")).all()
