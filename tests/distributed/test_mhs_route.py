"""Multi-Head Sampling by route, sharded, against a plain float64 process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhe_dist.config import HeadConfig
from mhe_dist.heads import HeadSpec, build
from mhe_dist.heads.base import NO_SAMPLE, LabelError
from mhe_dist.topology import Topology
from tests.distributed.reference import DenseHead

CLASSES = 46  # 12 heads of 4, two padding slots
STEPS, MICRO_BATCHES, BATCH, WIDTH = 3, 6, 4, 5
LR = 0.1


def head_config(**changes: object) -> HeadConfig:
    values = {
        "kind": "mhs",
        "margin": {"kind": "cosface", "m": 0.3, "scale": 8.0},
        "optim": {"weight_decay": 0.01},
        "groups": 3,
        "mhs": {"length": 4, "extra_heads": 2},
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return HeadConfig.model_validate(values)


def inputs(labels: str, num_classes: int) -> tuple[Tensor, Tensor]:
    """Embeddings `[steps, n, B, D]` and labels `[steps, n, B]` of a run, global."""
    rng = torch.Generator().manual_seed(7)
    embeddings = torch.randn(STEPS, MICRO_BATCHES, BATCH, WIDTH, generator=rng, dtype=torch.float64)
    drawn = torch.randint(0, num_classes, (STEPS, MICRO_BATCHES, BATCH), generator=rng)
    if labels == "repeated":
        drawn = drawn % 3
    elif labels == "one":
        drawn = torch.full_like(drawn, 5)
    elif labels == "short":
        drawn[:, -1, 1:] = NO_SAMPLE
        drawn[:, 0] = NO_SAMPLE
    return embeddings, drawn


def train_head(
    place: Topology, config: dict, num_classes: int, labels: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Run the head on this rank's micro-batches as the loop would, engine scaling included."""
    torch.manual_seed(0)
    embeddings, drawn = inputs(labels, num_classes)
    spec = HeadSpec(HeadConfig.model_validate(config), num_classes, WIDTH, 3, MICRO_BATCHES, dtype)
    head = build(spec, place)
    k = MICRO_BATCHES // place.world_size
    losses, grads = [], []
    for step in range(STEPS):
        head.plan(step, drawn[step])
        loss_sum, step_grads = torch.zeros((), dtype=dtype), []
        for index in place.share(MICRO_BATCHES):
            valid = drawn[step, index] != NO_SAMPLE
            x = embeddings[step, index][valid].to(dtype).requires_grad_()
            output = head(x, drawn[step, index][valid])
            (output.loss / k).backward()
            loss_sum += output.loss.detach() / k
            full = torch.zeros(BATCH, WIDTH, dtype=dtype)
            full[valid] = x.grad / place.world_size
            step_grads.append(full)
        head.step(LR)
        losses.append(loss_sum / place.world_size)
        grads.append(torch.stack(step_grads))
    state = {name: tensor for name, tensor in head.state().items() if head.wants(name)}
    return {"losses": torch.stack(losses), "grads": torch.stack(grads, 1)} | state


def reference(
    config: HeadConfig, num_classes: int, labels: str
) -> tuple[Tensor, Tensor, DenseHead, set[int], object]:
    """The same run by the plain definition."""
    head = build(HeadSpec(config, num_classes, WIDTH, 3, MICRO_BATCHES, torch.float64), Topology())
    layout = head.layout
    heads = torch.arange(layout.heads)
    dense = DenseHead(config, head.initial_rows(heads).flatten(0, 1).requires_grad_())
    embeddings, drawn = inputs(labels, num_classes)
    losses, grads, ever = [], [], set()
    for step in range(STEPS):
        x = embeddings[step].clone().requires_grad_()
        valid = drawn[step] != NO_SAMPLE
        own, slot = layout.locate(drawn[step][valid])
        extra = {g: head.draw(step, g).tolist() for g in set(layout.group_of(own).tolist())}
        seen, touched = [], set().union(*extra.values(), own.tolist())
        for h, g in zip(own.tolist(), layout.group_of(own).tolist(), strict=True):
            chosen = sorted({h, *extra[g]})
            rows = [i * layout.length + j for i in chosen for j in range(layout.length)]
            seen.append([r for r in rows if r < num_classes])
        targets = (own * layout.length + slot).tolist()
        loss = dense.loss(x[valid], targets, seen)
        loss.backward()
        losses.append(loss.detach())
        grads.append(x.grad)
        rows = [h * layout.length + j for h in sorted(touched) for j in range(layout.length)]
        dense.update(dense.rows.grad, rows, LR)
        ever |= touched
    return torch.stack(losses), torch.stack(grads), dense, ever, layout


CASES = {
    "cosface": {},
    "arcface": {"margin": {"kind": "arcface", "m": 0.5}},
    "combined": {"margin": {"kind": "combined", "m1": 1.1, "m2": 0.2, "m3": 0.1}},
    "softmax": {"margin": {"kind": "softmax"}},
    "none": {"margin": {"kind": "none", "scale": 1.0}},
    "own": {"mhs": {"negatives": "own"}},
    "adamw": {"optim": {"kind": "adamw"}},
    "filter": {"margin": {"filter": 0.2}},
    "many_extra": {"mhs": {"extra_heads": 50}},
}


LABELS = ("random", "repeated", "one", "short")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equals_one_plain_process(run_distributed, world_size: int) -> None:
    runs = [
        (name, head_config(**changes).model_dump(), labels, dtype)
        for name, changes in CASES.items()
        for labels in LABELS
        for dtype in TOLERANCE
    ]
    ranks = run_distributed(train_heads, world_size, runs)
    for number, (name, config, labels, dtype) in enumerate(runs):
        found = [rank[number] for rank in ranks]
        check(found, HeadConfig.model_validate(config), labels, dtype, f"{name}, {labels}")


def train_heads(place: Topology, runs: list) -> list[dict[str, Tensor]]:
    return [train_head(place, config, CLASSES, labels, dtype) for _, config, labels, dtype in runs]


def check(ranks, config, labels, dtype, name) -> None:
    losses, grads, dense, ever, layout = reference(config, CLASSES, labels)
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype], "check_dtype": False}
    total = sum(rank["losses"] for rank in ranks)
    torch.testing.assert_close(total, losses, **near, msg=lambda m: f"{name}: loss: {m}")
    found = torch.cat([rank["grads"] for rank in ranks]).transpose(0, 1)
    torch.testing.assert_close(found, grads, **near, msg=lambda m: f"{name}: embeddings: {m}")
    units = torch.cat([r[n] for r in ranks for n in sorted(r) if n.endswith("/units")])
    assert units.tolist() == sorted(ever), name
    expected = {"weight": dense.rows.detach()}
    if config.optim.kind == "sgd":
        expected["momentum"] = dense.state["v"]
    else:
        expected |= {"exp_avg": dense.state["m"], "exp_avg_sq": dense.state["u"]}
    for field, values in expected.items():
        rows = torch.cat([r[n] for r in ranks for n in sorted(r) if n.endswith("/" + field)])
        wanted = values.view(layout.heads, layout.length, -1)[units]
        torch.testing.assert_close(rows, wanted, **near, msg=lambda m: f"{name}: {field}: {m}")


def test_bad_label_is_named_or_ignored() -> None:
    labels = torch.tensor([[1, 46, 2]])
    build(HeadSpec(head_config(on_bad_label="ignore"), 46, WIDTH, 0, 1), Topology()).plan(0, labels)
    head = build(HeadSpec(head_config(), 46, WIDTH, 0, 1), Topology())
    with pytest.raises(LabelError, match=r"label 46 .*'cat7'.* outside \[0, 46\)") as caught:
        try:
            head.plan(0, labels)
        except LabelError as error:
            raise error.of_sample("cat7") from None
    assert (caught.value.micro_batch, caught.value.position) == (0, 1)
