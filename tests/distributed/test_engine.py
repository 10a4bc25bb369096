"""The engine against plain torch, against itself on other numbers of ranks and at other stages."""

from __future__ import annotations

import shutil
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from mhe_dist.backbone.model import compile_in_place
from mhe_dist.backbone.normalization import Normalization, normalize_images
from mhe_dist.config.schema import Config
from mhe_dist.distributed.topology import Topology, disconnect
from mhe_dist.engine import settings
from mhe_dist.engine.engine import Engine
from mhe_dist.errors import UserError

N, B, SIZE, D = 6, 4, 8, 5  # micro-batches of a step, images in one, their side, embedding width
LR = 0.02
ROUNDING = 5e-6  # of a gradient: 80 roundings to float32, of a sum over all pixels of a batch


class Net(nn.Module):
    """Odd sizes throughout, so that no partition is even."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, bias=False)
        self.norm: Any = nn.BatchNorm2d(7)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(7, D)
        self.scale = nn.Parameter(torch.full((1,), 1.5), requires_grad=False)
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.conv(images))).mean((2, 3))
        return self.fc(self.drop(hidden)) * self.scale


def make_net(dropout: float = 0.0) -> Net:
    torch.manual_seed(5)
    return Net(dropout)


def make_config(**changes: Any) -> Config:
    values: dict[str, Any] = {
        "data.shards": "none",
        "data.streams": N * B,
        "train.global_batch": N * B,
        "train.micro_batch": B,
        "train.precision": "float32",
        "scale.zero_stage": 1,
        "optim.lr": 0.1,
        "optim.weight_decay": 0.01,
    } | changes
    tree: dict[str, Any] = {}
    for path, value in values.items():
        section, key = path.split(".")
        tree.setdefault(section, {})[key] = value
    return Config.model_validate(tree)


def make_engine(net: nn.Module, topology: Topology, **changes: Any) -> Engine:
    config = make_config(**changes)
    return Engine(
        net, config.optim, config.train, topology, config.scale.zero_stage, config.run.seed
    )


def images_of(step: int) -> Tensor:
    """uint8 `[N, B, 3, SIZE, SIZE]`; micro-batches differ in brightness, so statistics do too."""
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randint(0, 64, (N, B, 3, SIZE, SIZE), generator=generator)
    return (images + 48 * torch.arange(N).view(N, 1, 1, 1, 1)).to(torch.uint8)


def loss_of(embeddings: Tensor, index: int) -> Tensor:
    """Mean over the micro-batch of a function that differs between the micro-batches."""
    target = torch.linspace(-1, 1, D) * (index + 1)
    return (embeddings - target).square().sum(1).mean()


def train(engine: Engine, topology: Topology, steps: range) -> list[Tensor]:
    norms = []
    for step in steps:
        batches = images_of(step)
        for index in topology.share(N):
            engine.backward(loss_of(engine.forward(batches[index], step, index), index))
        engine.step(LR / (step + 1))
        norm = engine.grad_norm()
        assert norm is not None
        norms.append(norm.detach().clone())
    return norms


def run(topology: Topology, changes: dict[str, Any], steps: int, dropout: float = 0.0) -> dict:
    engine = make_engine(make_net(dropout), topology, **changes)
    norms = train(engine, topology, range(steps))
    return {"state": engine.state(), "norms": norms, "embed": engine.embed(images_of(99)[0])}


def reference(changes: dict[str, Any], steps: int, error: float = 0.0) -> dict[str, Any]:
    """The same training in plain torch and float64: the mean loss over all micro-batches.

    Args:
        error: added to all gradients of a parameter, as a share of their root mean square.
    """
    optim = make_config(**changes).optim
    net = make_net().double()
    trained = [p for p in net.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(groups, lr=LR, momentum=0.9)
        if optim.kind == "sgd"
        else torch.optim.AdamW(groups, lr=LR, betas=optim.betas)
    )
    norms = []
    for step in range(steps):
        start = [net.norm.running_mean.clone(), net.norm.running_var.clone()]
        means = [torch.zeros_like(b) for b in start]
        for index, images in enumerate(images_of(step)):
            net.norm.running_mean.copy_(start[0])
            net.norm.running_var.copy_(start[1])
            (loss_of(net(images.double() / 127.5 - 1), index) / N).backward()
            means[0] += net.norm.running_mean / N
            means[1] += net.norm.running_var / N
        net.norm.running_mean.copy_(means[0])
        net.norm.running_var.copy_(means[1])
        for gradient in (p.grad for p in trained if p.grad is not None):
            gradient.add_(error * gradient.square().mean().sqrt())
        limit = optim.clip_norm or float("inf")
        norms.append(nn.utils.clip_grad_norm_(trained, limit).detach())
        for group in optimizer.param_groups:
            group["lr"] = LR / (step + 1)
        optimizer.step()
        optimizer.zero_grad()
    embed = net.eval()(images_of(99)[0].double() / 127.5 - 1)
    return {"net": net, "norms": norms, "embed": embed.detach()}


def assert_equals_reference(result: dict, changes: dict[str, Any], steps: int) -> None:
    """Within the bounds, and within what rounded gradients would do to the reference itself.

    AdamW divides a gradient by its size: where one is next to nothing, its rounding counts whole.
    """
    expected = reference(changes, steps)
    rounded = reference(changes, steps, ROUNDING)["net"].state_dict()
    for name, tensor in expected["net"].state_dict().items():
        ours = result["state"][f"model.{name}"]
        if name == "norm.num_batches_tracked":
            assert ours == steps, "statistics count steps, not micro-batches"
            continue
        allowed = 5e-6 + 2e-5 * tensor.abs() + (rounded[name] - tensor).abs()
        assert ((ours.double() - tensor).abs() <= allowed).all(), name
    for ours, norm in zip(result["norms"], expected["norms"], strict=True):
        torch.testing.assert_close(ours.double(), norm, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(result["embed"].double(), expected["embed"], rtol=2e-5, atol=1e-5)


CASES: dict[str, dict[str, Any]] = {
    "sgd": {"optim.kind": "sgd"},
    "clipped": {"optim.kind": "sgd", "optim.clip_norm": 0.5},
    "adamw": {"optim.kind": "adamw", "optim.clip_norm": 3.0},
}


STAGES = [0, 1, 2, 3]


def run_cases(topology: Topology) -> dict[tuple[str, int], dict]:
    return {
        (name, stage): run(topology, case | {"scale.zero_stage": stage}, 4)
        for name, case in CASES.items()
        for stage in STAGES
    }


def run_with_dropout(topology: Topology) -> dict[int, dict[str, Tensor]]:
    """The state at each ZeRO stage, with gradients that are clipped in some steps."""
    changes = CASES["clipped"]
    runs = {stage: run(topology, changes | {"scale.zero_stage": stage}, 4, 0.5) for stage in STAGES}
    return {stage: result["state"] for stage, result in runs.items()}


def test_equals_plain_float64_training_on_one_and_two_ranks(run_distributed) -> None:
    """Parameters, statistics, norms, embeddings; two ranks then equal one bit for bit."""
    (alone,) = run_distributed(run_cases, 1)
    for (name, _), result in alone.items():
        assert_equals_reference(result, CASES[name], 4)
    for results in run_distributed(run_cases, 2):
        for case, result in results.items():
            equal(result["state"], alone[case]["state"])
            assert result["norms"] == alone[case]["norms"]


def test_rounding_depends_on_nothing_but_the_step(run_distributed) -> None:
    """Bit for bit on one, two and three ranks, at each ZeRO stage, with dropout."""
    (alone,) = run_distributed(run_with_dropout, 1)
    plain = reference(CASES["clipped"], 4)["net"].fc.weight.float()
    assert (alone[0]["model.fc.weight"] - plain).abs().max() > 1e-3, "dropout does something"
    for world_size in (1, 2, 3):
        for states in run_distributed(run_with_dropout, world_size):
            for state in states.values():
                equal(state, alone[0])


def run_short_steps(topology: Topology) -> dict[str, Tensor]:
    """Steps of two micro-batches, at ZeRO 1."""
    engine = make_engine(make_net(), topology, **{"train.global_batch": 2 * B, "data.streams": B})
    for step in range(4):
        batches = images_of(step)
        for index in topology.share(2):
            engine.backward(loss_of(engine.forward(batches[index], step, index), index))
        engine.step(LR)
    return engine.state()


def test_one_micro_batch_a_rank_is_rounded_as_several_are(run_distributed) -> None:
    """Its gradient travels in float32, that of several in float64: the sum is the same."""
    (alone,) = run_distributed(run_short_steps, 1)
    assert not torch.equal(alone["model.fc.weight"], make_net().fc.weight), "it trained"
    for state in run_distributed(run_short_steps, 2):
        equal(state, alone)


def run_compiled(topology: Topology, changes: dict[str, Any], steps: int) -> dict:
    net = make_net()
    compile_in_place(net, topology.device)
    engine = make_engine(net, topology, **changes)
    norms = train(engine, topology, range(steps))
    return {"state": engine.state(), "norms": norms, "embed": engine.embed(images_of(99)[0])}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiled_network_equals_plain_training(run_distributed) -> None:
    (result,) = run_distributed(run_compiled, 1, CASES["sgd"], 4)
    assert_equals_reference(result, CASES["sgd"], 4)


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


def other_engine(topology: Topology, kind: str, stage: int) -> Engine:
    """An engine whose model starts elsewhere."""
    net = make_net()
    with torch.no_grad():
        for tensor in (*net.parameters(), net.norm.running_mean, net.norm.running_var):
            tensor.add_(7.0)
    return make_engine(net, topology, **{"optim.kind": kind, "scale.zero_stage": stage})


def go_round_the_stages(topology: Topology, kind: str) -> dict[str, dict[str, Tensor]]:
    """Hand the state from stage to stage, train a step on each, and never hand it on."""
    stages = [0, 1, 2, 3, 1, 0]
    first = make_engine(make_net(), topology, **{"optim.kind": kind, "scale.zero_stage": stages[0]})
    stays, goes = first, first
    fresh = other_engine(topology, kind, 3)
    fresh.load_state(first.state())
    equal(fresh.state(), first.state())
    for step, stage in enumerate(stages[1:]):
        state = goes.state()
        goes = other_engine(topology, kind, stage)
        goes.load_state(state)
        equal(goes.state(), state)
        train(goes, topology, range(step, step + 1))
    train(stays, topology, range(len(stages) - 1))
    equal(goes.state(), stays.state())
    return {"state": goes.state(), "embed": {"": goes.embed(images_of(9)[0])}}


def load_and_compare(topology: Topology, kind: str, stage: int, before: dict) -> None:
    engine = other_engine(topology, kind, stage)
    engine.load_state(before["state"])
    equal(engine.state(), before["state"])
    torch.testing.assert_close(engine.embed(images_of(9)[0]), before["embed"][""])


def load_and_compare_all(topology: Topology, befores: dict[str, dict]) -> bool:
    for kind, before in befores.items():
        for stage in STAGES:
            load_and_compare(topology, kind, stage, before)
    return True


def go_round_both(topology: Topology) -> dict[str, dict]:
    return {kind: go_round_the_stages(topology, kind) for kind in ["sgd", "adamw"]}


def test_state_moves_bit_exactly_between_stages_and_ranks(run_distributed) -> None:
    """SGD and AdamW; ZeRO 0 -> 1 -> 2 -> 3 -> 1 -> 0 on two ranks, then to one at each stage."""
    results = run_distributed(go_round_both, 2)
    for kind, result in results[0].items():
        equal(results[1][kind]["state"], result["state"])
    names = results[0]["adamw"]["state"].keys()
    assert {"model.fc.weight", "optim.fc.weight.exp_avg_sq", "optim.step"} <= names
    assert "model.unsaved" not in names
    assert results[0]["adamw"]["state"]["optim.step"] == 5
    assert results[0]["sgd"]["state"]["optim.fc.bias.momentum_buffer"].abs().sum() > 0
    assert run_distributed(load_and_compare_all, 1, results[0]) == [True]


def refusal(engine: Engine, tensors: dict[str, Tensor]) -> str:
    with pytest.raises(UserError) as caught:
        engine.load_state(tensors)
    return str(caught.value)


def alone(_: Topology) -> dict[Any, Any]:
    """What needs no second rank, in a process without a process group."""
    disconnect()
    topology = Topology()
    images = images_of(0)
    results: dict[Any, Any] = {}

    engine = make_engine(make_net(0.5), topology)
    results["norm before a step"] = engine.grad_norm()
    one = engine.forward(images[0], 3, 0).detach()
    torch.rand(17)
    results["same key"] = torch.equal(engine.forward(images[0], 3, 0), one)
    results["other step"] = torch.equal(engine.forward(images[0], 4, 0), one)
    results["other micro-batch"] = torch.equal(engine.forward(images[0], 3, 1), one)
    engine.backward(engine.forward(images[0], 3, 0).sum())
    with pytest.raises(RuntimeError, match="after 1 of this rank's 6 micro-batches"):
        engine.step(0.1)

    net: Any = make_net()
    net.normalization = Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    inputs = normalize_images(images[0], net.normalization)
    engine = make_engine(net, topology)
    with torch.no_grad():
        results["embedded"] = torch.equal(engine.embed(images[0]), net.eval()(inputs))
        results["trained on"] = torch.equal(engine.forward(images[0], 0, 0), net(inputs))

    engine = make_engine(make_net(), topology)
    state = engine.state()
    results["missing"] = refusal(engine, {n: t for n, t in state.items() if n != "model.fc.bias"})
    results["shape"] = refusal(engine, state | {"model.fc.weight": torch.zeros(6, 7)})
    adamw = make_engine(make_net(), topology, **{"optim.kind": "adamw"})
    results["optimizer"] = refusal(adamw, state)

    for stage in STAGES:
        changes = {"train.precision": "bf16", "scale.zero_stage": stage}
        engine = make_engine(make_net(), topology, **changes)
        train(engine, topology, range(4))
        plain = make_net()
        state = engine.state()
        plain.load_state_dict({n[6:]: t for n, t in state.items() if n.startswith("model.")})
        with torch.no_grad():
            expected = plain.eval()(images[0].float() / 127.5 - 1)
        results["bf16", stage] = {
            "dtypes": sorted({str(t.dtype) for t in state.values()}),
            "precision": engine.precision,
            "embed": (engine.embed(images[0]) - expected).abs().max(),
            "gradient": engine.grad_norm(),
            "train": engine.forward(images[0], 9, 0).detach(),
            "net": expected,
        }
    return results


def train_where_one_rank_has_bf16(topology: Topology) -> str:
    with mock.patch.object(settings, "_cpu_multiplies_bf16", lambda: topology.is_first):
        engine = make_engine(make_net(), topology, **{"train.precision": "auto"})
    train(engine, topology, range(2))
    return engine.precision


def test_ranks_agree_on_what_the_precision_is(run_distributed) -> None:
    assert run_distributed(train_where_one_rank_has_bf16, 2) == ["float32", "float32"]


def test_one_rank_alone(run_distributed) -> None:
    (results,) = run_distributed(alone, 1)
    assert results["norm before a step"] is None
    assert results["same key"]
    assert not results["other step"]
    assert not results["other micro-batch"]
    assert results["trained on"] and results["embedded"], "images as the backbone wants them"
    assert "model.fc.bias: this run has (5,), the checkpoint none" in results["missing"]
    assert "model.fc.weight: this run has (5, 7), the checkpoint (6, 7)" in results["shape"]
    assert "optim.conv.weight.exp_avg: this run has" in results["optimizer"]
    assert "and" in results["optimizer"] and "more" in results["optimizer"]
    for stage in STAGES:
        bf16 = results["bf16", stage]
        assert bf16["precision"] == "bf16"
        assert bf16["dtypes"] == ["torch.float32", "torch.int64"]
        assert bf16["embed"] < 1e-6, "evaluation is in float32, with the float32 weights"
        assert bf16["train"].dtype == torch.float32
        # The first stage is the yardstick: bfloat16 rounds, but alike at every stage.
        torch.testing.assert_close(
            bf16["gradient"], results["bf16", 0]["gradient"], rtol=0.05, atol=0.05
        )


def statistics_of_a_rank(topology: Topology) -> dict[str, Any]:
    engine = make_engine(make_net(), topology)
    mean = dict(engine.model.named_buffers())["norm.running_mean"]
    engine.forward(images_of(0)[topology.rank], 0, topology.rank)
    apart = mean.clone()
    with pytest.raises(RuntimeError, match="within a step"):
        engine.embed(images_of(0)[0])
    engine = make_engine(make_net(), topology)
    train(engine, topology, range(1))
    mean = dict(engine.model.named_buffers())["norm.running_mean"]
    together = mean.clone()
    engine.embed(images_of(0)[0])
    engine.state()
    assert torch.equal(mean, together), "a save or an evaluation changes nothing"
    return {"apart": apart, "together": together}


def test_ranks_agree_on_the_statistics_after_every_step(run_distributed) -> None:
    one, two = run_distributed(statistics_of_a_rank, 2)
    assert not torch.equal(one["apart"], two["apart"])
    assert torch.equal(one["together"], two["together"])
