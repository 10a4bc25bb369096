"""IResNet: the names, shapes and function of arcface_torch's network, written down once more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from mhe_dist.backbone.export import export_timm
from mhe_dist.backbone.iresnet import IResNet
from mhe_dist.backbone.model import build_backbone
from mhe_dist.backbone.normalization import normalize_images
from mhe_dist.backbone.pretrained import load_pretrained
from mhe_dist.config.schema import ModelConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.engine.batchnorm import RunningStatistics
from mhe_dist.errors import UserError
from pipelines.runs.first_model import initial_model
from tests.support import tiny

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
DEPTHS[200] = (6, 26, 60, 6)
MILLIONS = {18: 24.03, 34: 34.14, 50: 43.59, 100: 65.16, 200: 118.83}


def expected_shapes(blocks: tuple[int, ...], dim: int) -> dict[str, tuple[int, ...]]:
    """What `pth` of arcface_torch holds."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 3, 3), "prelu.weight": (64,)}

    def norm(name: str, width: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    norm("bn1", 64)
    inputs = 64
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), 1):
        for number in range(count):
            name = f"layer{stage}.{number}"
            norm(f"{name}.bn1", inputs)
            shapes[f"{name}.conv1.weight"] = (width, inputs, 3, 3)
            norm(f"{name}.bn2", width)
            shapes[f"{name}.prelu.weight"] = (width,)
            shapes[f"{name}.conv2.weight"] = (width, width, 3, 3)
            norm(f"{name}.bn3", width)
            if number == 0:
                shapes[f"{name}.downsample.0.weight"] = (width, inputs, 1, 1)
                norm(f"{name}.downsample.1", width)
            inputs = width
    norm("bn2", 512)
    shapes |= {"fc.weight": (dim, 512 * 7 * 7), "fc.bias": (dim,)}
    norm("features", dim)
    return shapes


def config(**changes: object) -> ModelConfig:
    values = {"name": "iresnet18", "embedding_dim": 16, "neck": "none"} | changes
    return ModelConfig.model_validate(values)


@pytest.mark.parametrize("depth", DEPTHS)
def test_names_and_shapes_are_those_of_the_released_weights(depth: int) -> None:
    with torch.device("meta"):
        model = build_backbone(config(name=f"iresnet{depth}", embedding_dim=512), 112).net
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == expected_shapes(DEPTHS[depth], 512)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
        MILLIONS[depth], abs=0.005
    )


def plain(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """arcface_torch's forward pass in functional form, from the state dict alone."""

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        parts = [weights[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(x, *parts, eps=1e-5)

    x = functional.conv2d(x, weights["conv1.weight"], padding=1)
    x = functional.prelu(norm("bn1", x), weights["prelu.weight"])
    blocks = sorted({n.rsplit(".bn1", 1)[0] for n in weights if ".bn1.weight" in n})
    for block in blocks:
        stride = 2 if f"{block}.downsample.0.weight" in weights else 1
        out = functional.conv2d(
            norm(f"{block}.bn1", x), weights[f"{block}.conv1.weight"], None, 1, 1
        )
        out = functional.prelu(norm(f"{block}.bn2", out), weights[f"{block}.prelu.weight"])
        out = functional.conv2d(out, weights[f"{block}.conv2.weight"], None, stride, 1)
        if stride == 2:
            x = functional.conv2d(x, weights[f"{block}.downsample.0.weight"], None, 2)
            x = norm(f"{block}.downsample.1", x)
        x = norm(f"{block}.bn3", out) + x
    x = functional.linear(norm("bn2", x).flatten(1), weights["fc.weight"], weights["fc.bias"])
    return norm("features", x)


@pytest.fixture(scope="module")
def model() -> IResNet:
    torch.manual_seed(0)
    net = build_backbone(config(), 32).net
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(part.running_mean, -0.5, 0.5)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
    return net.eval()


@torch.no_grad()
def test_the_function_is_arcface_torchs(model: IResNet) -> None:
    images = torch.randn(3, 3, 32, 32)
    expected = plain(model.state_dict(), images)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    head = model.forward_head(model.forward_features(images))
    torch.testing.assert_close(head, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_widths_and_strides_of_small_pictures() -> None:
    kwargs = {"widths": [4, 8, 8, 16], "strides": [1, 2, 2, 2]}
    net = build_backbone(config(name="iresnet10", kwargs=kwargs), 24).net.eval()
    assert [len(stage) for stage in (net.layer1, net.layer2, net.layer3, net.layer4)] == [1] * 4
    assert net.forward_features(torch.randn(2, 3, 24, 24)).shape == (2, 16, 3, 3)
    assert net(torch.randn(2, 3, 24, 24)).shape == (2, 16)
    with pytest.raises(UserError, match="img_size=20 is not a multiple of 8"):
        build_backbone(config(name="iresnet10", kwargs=kwargs), 20)
    with pytest.raises(UserError, match=r"widths=\[4, 8\].* give four each"):
        build_backbone(config(name="iresnet10", kwargs={"widths": [4, 8]}), 32)
    kwargs |= {"strides": [2, 2, 1, 1], "stem_stride": 2}
    net = build_backbone(config(name="iresnet10", kwargs=kwargs), 24).net.eval()
    assert net.forward_features(torch.randn(2, 3, 24, 24)).shape == (2, 16, 3, 3)
    with pytest.raises(UserError, match="img_size=20 is not a multiple of 8"):
        build_backbone(config(name="iresnet10", kwargs=kwargs), 20)


@pytest.mark.slow
def test_weights_of_a_pth_file_begin_a_backbone(model: IResNet, tmp_path: Path) -> None:
    path = str(tmp_path / "backbone.pth")
    images = torch.randn(2, 3, 32, 32)
    for content in (
        model.state_dict(),
        {"state_dict": model.state_dict()},
        {f"module.{name}": tensor for name, tensor in model.state_dict().items()},
        {
            **{"epoch": 3, "global_step": 7, "state_dict_backbone": model.state_dict()},
            "state_dict_softmax_fc": {"weight": torch.zeros(9, 16)},
            "state_optimizer": torch.optim.SGD(model.parameters(), 0.1).state_dict(),
        },
        {n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")},
    ):
        torch.save(content, path)
        fresh = build_backbone(config(), 32)
        load_pretrained(fresh, path)
        assert torch.equal(fresh.eval()(images), model(images))
    with pytest.raises(UserError, match=r"fc\.bias: the model has \(12,\), the file \(16,\)"):
        load_pretrained(build_backbone(config(embedding_dim=12), 32), path)


def test_weights_of_an_exported_folder_and_of_a_run(tmp_path: Path) -> None:
    run = tiny.trained_run(tmp_path, "unused")
    trained = build_backbone(run.model, 16)
    load_pretrained(trained, run.run.path)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    inputs = normalize_images(images)
    torch.manual_seed(1)
    assert torch.equal(trained.eval()(inputs), build_backbone(run.model, 16).eval()(inputs))
    begin = run.model.model_dump() | {"init_from": run.run.path}
    again = build_backbone(run.model, 16).eval()
    load_pretrained(again, f"{run.run.path}/checkpoints/step_00000024")
    assert torch.equal(again(inputs), trained(inputs))
    assert torch.equal(
        initial_model(tiny.config(tmp_path, "unused", model=begin)).eval()(inputs),
        trained(inputs),
    )
    export_timm(trained, run, str(tmp_path / "timm"), images)
    begun = build_backbone(run.model.model_copy(update={"neck": "none"}), 16).eval()
    load_pretrained(begun, str(tmp_path / "timm"))
    torch.testing.assert_close(begun(inputs), trained(inputs))


def test_weights_of_another_iresnet_are_refused_with_its_name(tmp_path: Path) -> None:
    """The message listed six of hundreds of names, and left the cure to be guessed."""
    path = tmp_path / "backbone.pth"
    torch.save(build_backbone(config(name="iresnet18"), 32).net.state_dict(), path)
    cure = r"model\.neck\); its blocks are those of model\.name=iresnet18:"
    with pytest.raises(UserError, match=cure):
        load_pretrained(build_backbone(config(name="iresnet34"), 32), str(path))
    with pytest.raises(UserError, match=r"model\.neck\):"):
        load_pretrained(build_backbone(config(name="iresnet18", embedding_dim=12), 32), str(path))


def test_what_holds_no_weights_is_refused_and_does_not_run(tmp_path: Path) -> None:
    model = build_backbone(config(), 32)
    path = tmp_path / "evil.pth"

    class Evil:
        def __reduce__(self) -> object:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"a": Evil()}, path)
    with pytest.raises(UserError, match=r"evil\.pth: not a file of weights alone") as refused:
        load_pretrained(model, str(path))
    assert "Unsupported global" in str(refused.value)
    assert "likely succeed" not in str(refused.value), "torch's advice to run what is in it"
    assert not (tmp_path / "ran").exists()
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds list, no state dict"):
        load_pretrained(model, str(path))
    with pytest.raises(UserError, match="does not exist"):
        load_pretrained(model, str(tmp_path / "none.pth"))


def test_a_second_norm_behind_it_is_refused() -> None:
    with torch.device("meta"), pytest.raises(UserError, match=r"use model\.neck=none"):
        build_backbone(config(neck="batchnorm"), 112)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_vits_take_faces_of_112(size: str) -> None:
    name = f"vit_{size}_patch16_224"
    with torch.device("meta"):
        net = build_backbone(config(name=name, kwargs={"patch_size": 8}, embedding_dim=512), 112)
        assert net(torch.zeros(2, 3, 112, 112)).shape == (2, 512)
    assert net.net.patch_embed.num_patches == 14 * 14


def test_a_repeated_forward_pass_leaves_no_trace() -> None:
    """Gradient checkpointing: the same gradients, statistics and draws, to the last bit."""
    images = torch.randn(2, 6, 3, 32, 32)
    results = []
    for repeat in (False, True):
        torch.manual_seed(0)
        changes = {"grad_checkpointing": repeat, "kwargs": {"drop_rate": 0.2}}
        model = build_backbone(config(**changes), 32)
        statistics = RunningStatistics(model)
        for part in images:
            torch.manual_seed(1)
            statistics.begin_micro_batch()
            out = model(part)
            statistics.end_micro_batch()
            out.square().mean().backward()
        statistics.finish_step(Topology())
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        results.append(
            buffers | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        )
    assert results[0].keys() == results[1].keys()
    assert len(results[0]) > 100
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name
