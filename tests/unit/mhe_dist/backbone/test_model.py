"""timm backbones by config: names, image sizes, necks."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from mhe_dist.backbone.model import (
    build_backbone,
    check_model_name,
    compile_in_place,
    fold_neck,
    restore_backbone,
)
from mhe_dist.backbone.pretrained import load_pretrained
from mhe_dist.config.schema import ModelConfig
from mhe_dist.errors import UserError

SMALL = {"channels": [8, 8, 16, 16]}
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def config(**changes: Any) -> ModelConfig:
    values = {"name": "resnet10t", "kwargs": SMALL, "embedding_dim": 12} | changes
    return ModelConfig.model_validate(values)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, 32),
        ({}, 48),
        ({"neck": "none"}, 32),
        ({"name": "vit_tiny_patch16_224", "kwargs": VIT}, 32),
        ({"name": "vit_tiny_patch16_224", "kwargs": VIT}, 112),
    ],
)
def test_embeds_images_of_the_configured_size(changes: dict[str, Any], size: int) -> None:
    model = build_backbone(config(**changes), size).eval()
    embeddings = model(torch.zeros(2, 3, size, size))
    assert embeddings.shape == (2, 12)
    assert embeddings.dtype == torch.float32


EVA = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "kwargs"), [("mixer_s32_224", {}), ("eva02_tiny_patch14_224", EVA)]
)
@pytest.mark.parametrize("neck", ["none", "batchnorm"])
def test_an_embedding_layer_does_not_begin_at_zero(
    name: str, kwargs: dict[str, Any], neck: str
) -> None:
    """timm makes these classifiers zero, or a thousandth of what others are."""
    model = build_backbone(config(name=name, kwargs=kwargs, neck=neck), 32)
    found = model.net(torch.randn(8, 3, 32, 32))
    assert 0.1 < found.std() < 10
    torch.nn.functional.normalize(found).sum().backward()
    first = next(p for p in model.parameters() if p.grad is not None)
    assert 0 < first.grad.norm() < 1000


def test_an_embedding_layer_of_usual_size_stays_as_timm_makes_it() -> None:
    torch.manual_seed(3)
    net = timm.create_model("resnet10t", num_classes=12, **SMALL).state_dict()
    torch.manual_seed(3)
    found = build_backbone(config(), 32).net.state_dict()
    assert all(torch.equal(found[name], net[name]) for name in net)


def test_embeddings_stay_float32_under_autocast() -> None:
    model = build_backbone(config(neck="none"), 32).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.net(torch.zeros(1, 3, 32, 32)).dtype == torch.bfloat16
        assert model(torch.zeros(1, 3, 32, 32)).dtype == torch.float32


def test_the_same_generator_makes_the_same_weights() -> None:
    torch.manual_seed(3)
    one = build_backbone(config(), 32).state_dict()
    torch.manual_seed(3)
    two = build_backbone(config(), 32).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_an_unknown_name_meets_its_relatives() -> None:
    with pytest.raises(UserError, match=r"model\.name=resnet8t: .* did you mean .*resnet18t?"):
        build_backbone(config(name="resnet8t"), 32)
    with pytest.raises(UserError, match=r"timm\.list_models"):
        check_model_name("qqqqqqqq")


def test_arguments_that_a_model_refuses_are_named() -> None:
    with pytest.raises(UserError, match=r"model\.kwargs=\{'channel': 3\}.*resnet10t.*channel"):
        build_backbone(config(kwargs={"channel": 3}), 32)
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224 .* images of 32 pixels"):
        build_backbone(config(name="vit_tiny_patch16_224", kwargs=VIT | {"num_heads": 5}), 32)


def test_a_neck_that_could_not_be_folded_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.neck=none"):
        build_backbone(config(name="levit_128s", kwargs={}), 64)


@torch.no_grad()
def test_folding_the_neck_changes_nothing() -> None:
    model = build_backbone(config(), 32)
    images = torch.randn(16, 3, 32, 32)
    for _ in range(3):
        model.train()(images)
    assert isinstance(model.neck, nn.BatchNorm1d)
    model.neck.weight.uniform_(-2, 2)
    model.neck.bias.uniform_(-2, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model.eval()(images)
    torch.testing.assert_close(fold_neck(model)(images), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rebuild_makes_a_plain_copy_and_draws_nothing() -> None:
    torch.manual_seed(1)
    model = build_backbone(config(), 32)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.manual_seed(2)
    drawn = torch.rand(3)
    torch.manual_seed(2)
    copy = restore_backbone(config(), 32, state | {"optim.step": torch.zeros(())})
    assert torch.equal(torch.rand(3), drawn)
    assert not copy.training
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(copy(images), model.eval()(images))
    with pytest.raises(UserError, match="does not fit the weights"):
        restore_backbone(config(embedding_dim=13), 32, state)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="there is no no-such-compiler"):
        compile_in_place(nn.Linear(2, 2), torch.device("cpu"))


def test_compiling_for_a_gpu_needs_a_c_compiler_and_headers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Triton builds C at the first step, long after the run seemed to have begun."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(UserError, match=r"C compiler on a GPU, but there is no gcc: .* libc6-dev"):
        compile_in_place(nn.Linear(2, 2), torch.device("cuda"))
    (tmp_path / "clang").touch(mode=0o755)
    with pytest.raises(UserError, match=r"no Python\.h in .*python3-dev"):
        compile_in_place(nn.Linear(2, 2), torch.device("cuda"))
    (tmp_path / "Python.h").touch()
    compile_in_place(nn.Linear(2, 2), torch.device("cuda"))
    monkeypatch.setenv("CC", "other-cc")
    with pytest.raises(UserError, match="there is no other-cc"):
        compile_in_place(nn.Linear(2, 2), torch.device("cuda"))


@pytest.mark.parametrize("load", ["checkpoint", "file"])
def test_a_layer_in_several_places_is_one_tensor_of_a_checkpoint(load: str, tmp_path: Path) -> None:
    """CoaT's blocks share their position encoding; `named_parameters` names it once."""
    kwargs = {"embed_dims": [16] * 4, "serial_depths": [1, 2, 1, 1]}
    small = config(name="coat_lite_tiny", kwargs=kwargs, neck="none")
    model = build_backbone(small, 32)
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    tensors |= dict(model.named_buffers())
    assert len(tensors) < len(model.state_dict())
    if load == "file":
        names = {n.removeprefix("net."): t for n, t in tensors.items() if n.startswith("net.")}
        torch.save(names, tmp_path / "weights.pth")
        restored = build_backbone(small, 32)
        load_pretrained(restored, str(tmp_path / "weights.pth"))
    else:
        named = {f"model.{name}": tensor for name, tensor in tensors.items()}
        restored = restore_backbone(small, 32, named)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(restored.eval()(images), model.eval()(images))


@pytest.mark.parametrize("in_folder", [False, True])
def test_weights_that_are_cut_off_or_a_pointer_are_the_users_mistake(
    in_folder: bool, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    model = build_backbone(config(kwargs=SMALL), 32)
    with pytest.raises(UserError, match=r"model\.init_from=.*safetensors: no whole .*Git LFS"):
        load_pretrained(model, str(tmp_path if in_folder else path))
