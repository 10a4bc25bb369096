"""What an export may replace: exports, and nothing else."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import torch

from mhe_dist.backbone.model import build_backbone
from mhe_dist.errors import UserError
from pipelines.serving import exports
from pipelines.serving.exports import ExportFormat
from pipelines.serving.model_card import TrainedModel, is_model_card, model_card
from pipelines.serving.output_folder import refuse_overwriting
from tests import tiny

ALL = ["timm", "onnx", "torch-export", "mlflow", "hub-folder"]
CARD = "---\nlicense: mit\ntags:\n- timm\n- mhe\n---\n\n# photos, said anew\n"
THEIRS = {
    "README.md": ["README.md"],
    "mlflow/": ["mlflow/waiting.jsonl", "mlflow/run_id"],
    "mlflow/ of another program": ["mlflow/MLmodel"],
    "timm/": ["timm/config.json"],
    "hub/": ["hub/config.json", "hub/model.safetensors", "hub/onnx/model.onnx"],
    "hub/ with more in it": ["hub/README.md", "hub/.git/HEAD"],
    "hub/ with more models": ["hub/README.md", "hub/onnx/model.onnx", "hub/onnx/model_int8.onnx"],
}


def write(folder: Path, names: list[str], card: str = CARD) -> None:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(card if file.name == "README.md" else "")


def test_what_was_never_exported_is_not_replaced(tmp_path: Path) -> None:
    for number, (found, names) in enumerate(THEIRS.items()):
        folder = tmp_path / str(number)
        write(folder, names, card="# My project\n" if found == "README.md" else CARD)
        with pytest.raises(UserError) as refused:
            refuse_overwriting(str(folder), ALL)
        assert str(refused.value) == (
            f"--out={folder}: {found.split()[0]} there was not written by mhe export, which would "
            "replace it; move it away, or give another folder"
        )


def test_all_that_is_in_the_way_is_named_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, ["mlflow/mine", "hub/mine", "timm/config.json", "timm/notes"])
    with pytest.raises(UserError, match="timm/, mlflow/, hub/ there was not written"):
        refuse_overwriting(str(tmp_path), ALL)
    refuse_overwriting(str(tmp_path), ["onnx", "torch-export"])
    refuse_overwriting(str(tmp_path), ["mlflow"], with_head=True)  # mlflow-classifier/
    write(tmp_path, ["mlflow-classifier/mine"])
    with pytest.raises(UserError, match="mlflow-classifier/ there was not written"):
        refuse_overwriting(str(tmp_path), ["mlflow"], with_head=True)


def test_exports_are_replaced_and_what_lies_beside_them_stays(tmp_path: Path) -> None:
    refuse_overwriting(str(tmp_path / "new"), ALL)
    (tmp_path / "mlflow").mkdir()
    refuse_overwriting(str(tmp_path), ALL)
    timm = ["timm/config.json", "timm/model.safetensors", "timm/README.md", "timm/notes"]
    hub = [f"hub/{name}" for name in ("config.json", "README.md", "onnx/model.onnx")]
    mlflow = ["mlflow/MLmodel", "mlflow/image_model.py"]
    write(tmp_path, ["README.md", "mine.txt", "timm.txt", *timm, *hub, *mlflow])
    refuse_overwriting(str(tmp_path), ALL)
    write(tmp_path, ["hub/LICENSE"])
    with pytest.raises(UserError, match=": hub/ there was not written"):
        refuse_overwriting(str(tmp_path), ALL)


@pytest.mark.parametrize("name", ["timm", "hub-folder"])
def test_an_export_that_was_broken_off_may_be_repeated(
    name: ExportFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(tmp_path, "unused")
    model = build_backbone(config.model, config.data.image_size)
    inner = {"timm": "timm", "hub-folder": "hub"}[name]

    def break_off(*_: object) -> None:
        write(tmp_path, [f"{inner}/config.json", f"{inner}/model.safetensors"])
        raise KeyboardInterrupt

    monkeypatch.setattr(exports, "write_export", break_off)
    monkeypatch.setattr(exports, "export_timm", break_off)
    trained = TrainedModel(model, config, 24, {}, {})
    with pytest.raises(KeyboardInterrupt):
        exports.write_format(name, trained, str(tmp_path), torch.zeros(1, 3, 8, 8))
    refuse_overwriting(str(tmp_path), [name])


def test_a_store_is_looked_into_too() -> None:
    folder = "memory://photos/export"
    refuse_overwriting(folder, ALL)
    fsspec.filesystem("memory").pipe("/photos/export/mlflow/waiting.jsonl", b"")
    with pytest.raises(UserError, match="mlflow/ there was not written"):
        refuse_overwriting(folder, ALL)


def test_the_folder_of_a_run_takes_no_export(tmp_path: Path) -> None:
    write(tmp_path, ["config.yaml", "checkpoints/step_00000024/manifest.json"])
    with pytest.raises(UserError, match="is the folder of a run"):
        refuse_overwriting(str(tmp_path), ["onnx"])


def test_a_card_is_known_by_its_header(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, "unused")
    model = build_backbone(config.model, config.data.image_size)
    card = model_card(TrainedModel(model, config, 24, {}, {}), {"timm": "."})
    assert is_model_card(card) and is_model_card(card.replace("license: unknown", "license: mit"))
    assert is_model_card(CARD)
    others = ["", "# mhe\n", "---\ntags:\n- timm\n---\n\n- mhe\n", card.removeprefix("---\n")]
    assert not any(map(is_model_card, others))
