"""A head in somebody's own DDP loop: sharded, accumulated, unequal batches, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mhe_dist
from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from mhe_dist.heads.base import LabelError
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec, RowHead
from tests.conftest import run_ranks
from tests.support.heads.head_outcomes import softmax_of
from tests.support.heads.head_runs import gathered_state
from tests.support.heads.reference import DenseHead

CLASSES, INPUTS, WIDTH, STEPS, SAMPLES = 46, 6, 5, 4, 12
LR, SEED = 0.1, 3
BLOCKS: dict[str, Any] = {
    "margin": {"kind": "cosface", "m": 0.3, "scale": 8.0},
    "optim": {"kind": "sgd", "weight_decay": 0.01},
}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "route": ("mhs", {"length": 4, "extra_heads": 2}),
    "gather": ("mhs", {"length": 4, "extra_heads": 8, "exchange": "gather", "negatives": "batch"}),
    "full": ("full", {}),
    "partial_fc": ("partial_fc", {"rate": 0.4}),
    "mhp": ("mhp", {"lengths": [3, 4, 5]}),
    "mhc": ("mhc", {"lengths": [3, 4, 5], "candidates": 2}),
}
# Samples of each micro-batch of each rank, of the `SAMPLES` of a step.
CUTS = {
    "one each": [[6], [6]],
    "unequal": [[9], [3]],
    "accumulated": [[3, 3], [3, 3]],
    "accumulated, unequal": [[4, 1], [2, 5]],
    "a rank without a sample": [[6, 6], [0, 0]],
}


def make(name: str) -> Any:
    kind, options = HEADS[name]
    return mhe_dist.create_head(
        kind,
        num_classes=CLASSES,
        dim=WIDTH,
        seed=SEED,
        dtype=torch.float64,
        device="cpu",
        groups=3,
        **BLOCKS,
        **options,
    )


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(INPUTS, WIDTH).double()


def data() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(7)
    inputs = torch.randn(STEPS, SAMPLES, INPUTS, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (STEPS, SAMPLES), generator=rng)
    labels[:, 5] = labels[:, 0]  # a class comes twice
    return inputs, labels


def mine(step_data: Tensor, cut: list[list[int]], rank: int) -> list[Tensor]:
    first = sum(map(sum, cut[:rank]))
    return list(step_data[first : first + sum(cut[rank])].split(cut[rank]))


def train(topology: Topology, name: str, cut: list[list[int]]) -> dict[str, Any]:
    """A plain loop; by step the loss as this rank sees it, and the network's gradient."""
    model: nn.Module = network()
    if topology.world_size > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    head = make(name)
    losses, grads = [], []
    for inputs, labels in zip(*data(), strict=True):
        parts, part_labels = (mine(of, cut, topology.rank) for of in (inputs, labels))
        if len(parts) > 1:
            head.plan(part_labels)
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for part, answer in zip(parts, part_labels, strict=True):
            output = head(model(part), answer)
            output.loss.backward()
            loss += output.loss.detach()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        losses.append(loss)
        optimizer.step()
        head.step(LR)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    predicted = head.predict(torch.ones(topology.rank + 1, WIDTH).double(), k=3)
    return {
        "losses": torch.stack(losses),
        "grads": torch.stack(grads),
        "weights": weights,
        "classes": predicted.classes,
        "state": head.state_dict(),
    }


def train_all(topology: Topology) -> dict[str, dict[str, Any]]:
    return {f"{h}: {c}": train(topology, h, CUTS[c]) for h in HEADS for c in CUTS}


@pytest.fixture(scope="module")
def found() -> list[dict[str, dict[str, Any]]]:
    """By rank and case; one start of the ranks for all."""
    return run_ranks(train_all, 2)


def plain(name: str) -> dict[str, Any]:
    """The same training by the definition: one process, float64, dense rows, autograd."""
    kind, options = HEADS[name]
    values = {"kind": kind, "groups": 3, **BLOCKS, **({kind: options} if options else {})}
    config = HeadConfig.model_validate(values)
    head = build_head(HeadSpec(config, CLASSES, WIDTH, SEED, 1, torch.float64), Topology())
    assert isinstance(head, RowHead)
    layout = head.layout
    rows = head.initial_rows(torch.arange(layout.heads)).flatten(0, 1)
    dense = DenseHead(config, rows.requires_grad_())
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    losses, grads = [], []
    for step, (inputs, labels) in enumerate(zip(*data(), strict=True)):
        own, slot = layout.locate(labels)
        bias, touched = softmax_of(head, step, own)
        optimizer.zero_grad()
        loss = dense.loss(model(inputs), own * layout.length + slot, bias)
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        losses.append(loss.detach())
        optimizer.step()
        numbers = [unit * layout.length + j for unit in touched for j in range(layout.length)]
        dense.update(dense.rows.grad, numbers, LR)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {
        "losses": torch.stack(losses),
        "grads": torch.stack(grads),
        "weights": weights,
        "rows": dense.rows.detach(),
        "length": layout.length,
    }


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["route", "gather", "full", "partial_fc"])
def test_two_ranks_under_ddp_equal_one_plain_process(
    name: str, cut: str, found: list[dict[str, dict[str, Any]]]
) -> None:
    expected, ranks = plain(name), [rank[f"{name}: {cut}"] for rank in found]
    assert_near(sum(rank["losses"] for rank in ranks) / 2, expected["losses"])
    for rank in ranks:
        assert_near(rank["grads"], expected["grads"])
        assert_near(rank["weights"], expected["weights"])
    states = [rank["state"]["tensors"] for rank in ranks]
    units = gathered_state(states, "units")
    rows = expected["rows"].view(-1, expected["length"], WIDTH)
    assert_near(gathered_state(states, "weight"), rows[units])


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["mhp", "mhc"])
def test_heads_of_levels_under_ddp_equal_one_rank_with_one_batch(
    name: str, cut: str, found: list[dict[str, dict[str, Any]]]
) -> None:
    expected, ranks = train(Topology(), name, [[SAMPLES]]), [r[f"{name}: {cut}"] for r in found]
    assert_near(sum(rank["losses"] for rank in ranks) / 2, expected["losses"])
    tensors = {k: t for rank in ranks for k, t in rank["state"]["tensors"].items()}
    assert tensors.keys() == expected["state"]["tensors"].keys()
    for key, tensor in expected["state"]["tensors"].items():
        assert_near(tensors[key], tensor)
    for rank in ranks:
        assert_near(rank["grads"], expected["grads"])
        assert_near(rank["weights"], expected["weights"])


@pytest.mark.parametrize("name", HEADS)
def test_ranks_predict_for_as_many_embeddings_as_each_has(
    name: str, found: list[dict[str, dict[str, Any]]]
) -> None:
    alone = train(Topology(), name, [[SAMPLES]])["classes"]
    for number, rank in enumerate(found):
        classes = rank[f"{name}: one each"]["classes"]
        assert classes.tolist() == alone.tolist() * (number + 1)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_goes_on_from_what_other_ranks_saved(
    name: str, found: list[dict[str, dict[str, Any]]]
) -> None:
    states = [rank[f"{name}: one each"]["state"] for rank in found]
    head = make(name)
    head.load_state_dict(*states)
    assert head.step_number == STEPS
    tensors = {key: tensor for state in states for key, tensor in state["tensors"].items()}
    again = head.state_dict()["tensors"]
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    if name not in ("mhp", "mhc"):
        with pytest.raises(UserError, match="give the states of all of them"):
            head.load_state_dict(states[0])


def test_a_state_of_another_head_is_refused_by_name() -> None:
    head = mhe_dist.create_head("mhs", num_classes=CLASSES, dim=WIDTH, length=4, seed=1)
    other = mhe_dist.create_head("mhs", num_classes=CLASSES, dim=WIDTH, length=8, seed=1)
    with pytest.raises(UserError, match="has length=4, this one length=8"):
        other.load_state_dict(head.state_dict())


def two_batches() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, WIDTH), torch.randint(0, CLASSES, (2, 4))


def test_a_step_that_does_not_fit_its_plan_is_refused() -> None:
    head = mhe_dist.create_head("full", num_classes=CLASSES, dim=WIDTH)
    embeddings, labels = two_batches()
    with pytest.raises(UserError, match=r"after 0 of 0 planned"):
        head.step(LR)
    head(embeddings[0], labels[0])
    with pytest.raises(UserError, match=r"head.plan\(\[labels_1"):
        head(embeddings[1], labels[1])
    head.plan(list(labels))
    head(embeddings[0])
    with pytest.raises(UserError, match="not the labels"):
        head(embeddings[1], labels[0] + 1)
    with pytest.raises(UserError, match="1 of 2 planned"):
        head.step(LR)
    with pytest.raises(UserError, match="3 embeddings, but 4 labels"):
        head(embeddings[1, :3])
    head(embeddings[1], labels[1])
    head.step(LR)
    assert head.step_number == 1
    with torch.no_grad(), pytest.raises(UserError, match=r"head\.predict"):
        head(embeddings[0], labels[0])
    with pytest.raises(LabelError, match="label 46"):
        head(embeddings[0], labels[0] * 0 + CLASSES)


def test_rows_learn_when_the_network_is_frozen() -> None:
    head = mhe_dist.create_head("full", num_classes=CLASSES, dim=WIDTH, optim={"momentum": 0.0})
    embeddings, labels = two_batches()
    losses = []
    for _ in range(5):
        losses.append(head(embeddings[0], labels[0]).loss.item())
        head.step(0.05)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_several_labels_per_sample_may_be_padded_differently() -> None:
    def make_head() -> Any:
        options = {"lengths": [3, 4, 5], "objective": "multi_label"}
        return mhe_dist.create_head("mhc", num_classes=CLASSES, dim=WIDTH, seed=SEED, **options)

    embeddings = torch.randn(5, WIDTH)
    labels = torch.tensor([[1, 7, -1], [3, -1, -1], [-1, -1, -1], [40, 41, 45], [2, -1, -1]])
    whole, parts = make_head(), make_head()
    expected = whole(embeddings, labels).loss
    parts.plan([labels[:4], labels[4:, :1]])
    found = parts(embeddings[:4]).loss + parts(embeddings[4:]).loss
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mhs", {"lenght": 4}, r"create_head\('mhs'\).*lenght"),
        ("full", {"length": 4}, r"create_head\('full'\).*"),
        ("mhs", {"length": 0}, r"length: .*greater than 0"),
        ("mhs", {"negatives": "batch"}, "exchange=gather"),
        ("mhs", {"repartition_every": 1}, "steps_per_epoch"),
        ("mhs", {"bank": {"memory": "file"}}, "needs a folder"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        mhe_dist.create_head(kind, num_classes=CLASSES, dim=WIDTH, **options)


def test_ranks_that_have_not_met_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="init_process_group"):
        mhe_dist.create_head("full", num_classes=CLASSES, dim=WIDTH)
