"""The engine against plain torch, against itself on other numbers of ranks and at other stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhe_dist.config import Config
from mhe_dist.engine import Engine
from mhe_dist.topology import Topology

N, B, SIZE, D = 4, 6, 8, 5  # micro-batches of a step, images in one, their side, embedding width
LR = 0.02


class Net(nn.Module):
    """Odd sizes throughout, so that no partition is even."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, bias=False)
        self.norm = nn.BatchNorm2d(7)
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


def images_of(step: int) -> Tensor:
    """uint8 `[N, B, 3, SIZE, SIZE]`; micro-batches differ in brightness, so statistics do too."""
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randint(0, 64, (N, B, 3, SIZE, SIZE), generator=generator)
    return (images + 48 * torch.arange(N).view(N, 1, 1, 1, 1)).to(torch.uint8)


def loss_of(embeddings: Tensor, index: int) -> Tensor:
    """Mean over the micro-batch of a function that differs between the micro-batches."""
    target = torch.linspace(-1, 1, D) * (index + 1)
    return (embeddings - target).square().sum(1).mean()


def train(engine: Engine, place: Topology, steps: range) -> list[Tensor]:
    norms = []
    for step in steps:
        batches = images_of(step)
        for index in place.share(N):
            engine.backward(loss_of(engine.forward(batches[index], step, index), index))
        engine.step(LR / (step + 1))
        norm = engine.grad_norm()
        assert norm is not None
        norms.append(norm.detach().clone())
    return norms


def run(place: Topology, changes: dict[str, Any], steps: int, dropout: float = 0.0) -> dict:
    engine = Engine(make_net(dropout), make_config(**changes), place)
    norms = train(engine, place, range(steps))
    return {"state": engine.state(), "norms": norms, "embed": engine.embed(images_of(99)[0])}


def reference(changes: dict[str, Any], steps: int) -> dict[str, Any]:
    """The same training in plain torch and float64: the mean loss over all micro-batches."""
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
        limit = optim.clip_norm or float("inf")
        norms.append(nn.utils.clip_grad_norm_(trained, limit).detach())
        for group in optimizer.param_groups:
            group["lr"] = LR / (step + 1)
        optimizer.step()
        optimizer.zero_grad()
    embed = net.eval()(images_of(99)[0].double() / 127.5 - 1)
    return {"net": net, "norms": norms, "embed": embed.detach()}


def assert_equals_reference(result: dict, expected: dict, steps: int) -> None:
    for name, tensor in expected["net"].state_dict().items():
        ours = result["state"][f"model.{name}"]
        if name == "norm.num_batches_tracked":
            assert ours == steps, "statistics count steps, not micro-batches"
            continue
        torch.testing.assert_close(ours.double(), tensor, rtol=2e-5, atol=5e-6, msg=name)
    for ours, norm in zip(result["norms"], expected["norms"], strict=True):
        torch.testing.assert_close(ours.double(), norm, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(result["embed"].double(), expected["embed"], rtol=2e-5, atol=1e-5)


CASES = {
    "sgd": {"optim.kind": "sgd"},
    "clipped": {"optim.kind": "sgd", "optim.clip_norm": 0.5},
    "adamw": {"optim.kind": "adamw", "optim.clip_norm": 3.0},
}


STAGES = [0, 1, 2, 3]


def run_cases(place: Topology) -> dict[tuple[str, int], dict]:
    return {
        (name, stage): run(place, case | {"scale.zero_stage": stage}, 4)
        for name, case in CASES.items()
        for stage in STAGES
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_equals_plain_float64_training(run_distributed, world_size: int) -> None:
    """Parameters, statistics, norms and embeddings: W = 1 with k = 4 and W = 2 with k = 2 alike."""
    expected = {name: reference(case, 4) for name, case in CASES.items()}
    for results in run_distributed(run_cases, world_size):
        for (name, _), result in results.items():
            assert_equals_reference(result, expected[name], 4)
