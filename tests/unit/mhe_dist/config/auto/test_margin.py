"""`head.margin.m: auto`: the margin that keeps the target's mean probability."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhe_dist.config.auto.head_sizes import HeadDemand, choose_sizes, fill_sizes
from mhe_dist.config.head import HeadConfig
from mhe_dist.errors import UserError
from mhe_dist.heads.standalone import create_head

STUDY = HeadDemand(6_000, 128, 2, 256, 2, gpu=False)  # of `mhe reproduce margins`, on two workers
OWN_PLUS = {"mhs": {"length": 100, "extra_heads": 5}}


def margin_of(scale: float = 32, demand: HeadDemand = STUDY, **head: Any) -> float:
    margin = {"kind": "cosface", "scale": scale, "m": "auto"}
    config = HeadConfig.model_validate({"margin": margin, "groups": 2, **head})
    return fill_sizes(config, choose_sizes(config, demand)).margin.chosen_m


def test_fewer_classes_take_a_larger_margin() -> None:
    assert margin_of(kind="full") == 0.45
    assert margin_of(kind="partial_fc") == 0.522  # a tenth: ln(10) / 32 more
    assert margin_of(**OWN_PLUS) == 0.522
    assert margin_of(mhs={"length": 5, "extra_heads": 8}) == 0.603
    assert margin_of(scale=64, kind="partial_fc") == 0.486
    assert margin_of(demand=STUDY._replace(classes=60_000), **OWN_PLUS) == 0.594


def test_no_margin_is_larger_than_the_largest_that_was_measured() -> None:
    """Else a small scale would lead to one that no config may hold."""
    assert margin_of(scale=2, kind="partial_fc") == 0.75
    config = HeadConfig.model_validate({"margin": {"scale": 2, "m": "auto"}, "kind": "partial_fc"})
    assert choose_sizes(config, STUDY).why_margin.endswith("but never more than 0.75")


def test_a_correction_of_the_logits_leaves_nothing_to_give_back() -> None:
    corrected = {"mhs": OWN_PLUS["mhs"] | {"correction": True}}
    assert margin_of(**corrected) == 0.45


def test_the_targets_probability_stays() -> None:
    """Negatives with cosines of one distribution, all of them and one in twenty."""
    cosines = 0.1 * torch.randn(40_000, generator=torch.Generator().manual_seed(0)).double()
    scale, target = 16.0, 0.95

    def probability(negatives: torch.Tensor, m: float) -> float:
        logits = torch.cat([torch.tensor([target - m]).double(), negatives])
        return float((scale * logits).softmax(0)[0])

    demand = HeadDemand(40_000, 128, 2, 256, 2, gpu=False)
    rate = {"rate": 0.05}
    few = margin_of(scale, demand, kind="partial_fc", partial_fc=rate)
    full = margin_of(scale, demand, kind="full")
    expected = probability(cosines, full)
    assert 0.001 < expected < 0.999
    assert probability(cosines[::20], few) == pytest.approx(expected, rel=0.1)
    assert probability(cosines[::20], full) > 5 * expected


def test_why_is_said() -> None:
    config = HeadConfig.model_validate({"margin": {"m": "auto"}, "groups": 2, **OWN_PLUS})
    why = choose_sizes(config, STUDY).explain(["head.margin.m"], 6_000)
    assert "a sample meets 600 of 6,000 classes, so 0.036 more than the 0.45" in why
    assert "groups" not in why


@pytest.mark.parametrize(
    ("head", "named"),
    [
        ({"margin": {"kind": "arcface", "m": "auto"}}, "head.margin.kind=arcface"),
        ({"kind": "mhp", "margin": {"m": "auto"}}, "head.kind=mhp"),
        ({"margin": {"m": "auto"}, "objective": "multi_label"}, "head.objective=multi_label"),
    ],
)
def test_where_there_is_no_rule_a_number_is_asked_for(head: dict[str, Any], named: str) -> None:
    (message,) = HeadConfig.model_validate(head).validate_combinations(1)
    assert message.startswith("head.margin.m=auto is a rule for the softmax") and named in message


def test_a_head_of_a_loop_of_ones_own_gets_it_too() -> None:
    def loss(m: float | str) -> torch.Tensor:
        margin = {"kind": "cosface", "scale": 32, "m": m}
        head = create_head("full", num_classes=100, dim=4, margin=margin, groups=1)
        return head(torch.eye(4), torch.arange(4)).loss

    assert loss("auto") == loss(0.45) != loss(0.4)
    with pytest.raises(UserError, match="=auto is a rule for the softmax"):
        create_head("full", num_classes=9, dim=4, margin={"kind": "adaface", "m": "auto"})
