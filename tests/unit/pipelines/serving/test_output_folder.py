"""What an export may replace: exports, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from mhe_dist.backbone.export import ExportOptions
from mhe_dist.backbone.model import build_backbone
from mhe_dist.errors import RunError, UserError
from pipelines.serving import exports, output_folder
from pipelines.serving.exports import ExportFormat, write_format
from pipelines.serving.model_card import TrainedModel, is_model_card, model_card
from pipelines.serving.output_folder import refuse_overwriting
from tests.support import tiny
from tests.support.terminal import said

IMAGES = torch.randint(0, 256, (3, 3, tiny.SIDE, tiny.SIDE), dtype=torch.uint8)
ALL: list[ExportFormat] = ["timm", "onnx", "torch-export", "mlflow", "hub-folder"]
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


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def model_of(folder: Path, seed: int = 0, name: str = "tiny") -> TrainedModel:
    config = tiny.config(folder, "unused", run={"name": name})
    torch.manual_seed(seed)
    model = build_backbone(config.model, config.data.image_size).eval()
    return TrainedModel(model, config, 24 + seed, {"data_digest": "sha256:abc"}, {})


@pytest.fixture
def quick_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """What writes ONNX files takes no time, and writes nothing that could be read."""

    def write(*arguments: Any) -> float:
        Path(arguments[2]).write_text("a network")
        return 0.0

    monkeypatch.setattr(exports, "export_onnx", write)


EARLIER = {
    "timm": ["timm/config.json", "timm/model.safetensors", "timm/README.md", "timm/notes"],
    "onnx": ["backbone.onnx"],
    "torch-export": ["backbone.pt2"],
    "mlflow": ["mlflow/MLmodel", "mlflow/image_model.py", "mlflow/artifacts/backbone.onnx"],
    "hub-folder": ["hub/config.json", "hub/README.md", "hub/onnx/model.onnx"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EARLIER)
def test_an_export_that_differs_leaves_the_one_before_as_it_was(
    name: ExportFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, ["README.md", *EARLIER[name]])
    before = contents(tmp_path)
    for tolerance in ("ONNX_TOLERANCE", "TIMM_TOLERANCE"):
        monkeypatch.setattr(f"mhe_dist.backbone.export.{tolerance}", -1.0)
    inner = EARLIER[name][0].partition("/")[0]
    with pytest.raises(RunError, match=f"^{tmp_path}/{inner}.*: embeddings differ"):
        write_format(name, model_of(tmp_path), str(tmp_path), IMAGES)
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_card_tells_exports_of_other_models_apart(tmp_path: Path, quick_onnx: None) -> None:
    """A file of another step was shown as if it were of the one that was exported last."""
    first, second = model_of(tmp_path), model_of(tmp_path, seed=1_000, name="other")
    write_format("timm", first, str(tmp_path), IMAGES)
    write_format("onnx", first, str(tmp_path), IMAGES, ExportOptions(half=True))
    write_format("onnx", second, str(tmp_path), IMAGES)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n") and "# other\n" in card
    assert "### onnx\n" in card and '"backbone.onnx"' in card and "### timm" not in card
    _, others = card.split("## Other exports in this folder")
    assert "| `backbone_fp16.onnx` | tiny, step 24 |\n| `timm` | tiny, step 24 |" in others
    assert "backbone.onnx" not in others
    write_format("timm", second, str(tmp_path), IMAGES)
    (tmp_path / "backbone_fp16.onnx").unlink()
    write_format("onnx", second, str(tmp_path), IMAGES)
    card = (tmp_path / "README.md").read_text()
    assert "### timm" in card and "Other exports" not in card


def test_the_same_step_of_a_run_that_was_trained_anew_is_another_model(tmp_path: Path) -> None:
    first, again = model_of(tmp_path), model_of(tmp_path, seed=1)._replace(step=24)
    assert first.identity() == model_of(tmp_path).identity() != again.identity()
    assert first.origin() == again.origin()


def test_files_that_mhe_export_did_not_write_are_not_replaced(
    tmp_path: Path, quick_onnx: None
) -> None:
    theirs = ["backbone.onnx", "backbone_fp16.onnx", "backbone.pt2", "classifier_uint8.onnx"]
    write(tmp_path, [*theirs, "classifier.pt2", "class_names.tsv"])

    def refused(formats: list[ExportFormat], with_head: bool, **options: bool) -> str:
        with pytest.raises(UserError) as raised:
            refuse_overwriting(str(tmp_path), formats, with_head, ExportOptions(**options))
        return str(raised.value).partition(": ")[2].partition(" there was not written")[0]

    assert refused(ALL, False) == "backbone.onnx, backbone.pt2"
    assert refused(["onnx"], False, half=True) == "backbone_fp16.onnx"
    assert refused(["onnx"], True, pixels=True) == "classifier_uint8.onnx, class_names.tsv"
    assert refused(["torch-export"], True) == "classifier.pt2, class_names.tsv"
    (tmp_path / "backbone.onnx").unlink()
    write_format("onnx", model_of(tmp_path), str(tmp_path), IMAGES)
    refuse_overwriting(str(tmp_path), ["onnx"])
    write(tmp_path, ["backbone_uint8.onnx"])
    assert refused(["onnx"], False, pixels=True) == "backbone_uint8.onnx"
    assert "backbone_fp16.onnx" not in (tmp_path / "README.md").read_text()


def test_a_file_of_the_records_name_is_not_replaced(tmp_path: Path) -> None:
    for text in ("", "[1]", '{"a": 1}', '{"a": {"b": "c"}}', '"format"'):
        (tmp_path / "exports.json").write_text(text)
        with pytest.raises(UserError, match=r": exports\.json there was not written"):
            refuse_overwriting(str(tmp_path), ["onnx"])


def test_mhe_export_refuses_before_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.trained_run(tmp_path / "runs", "unused").run.path
    out = tmp_path / "out"
    out.mkdir()
    (out / "backbone_fp16.onnx").write_text("of the user")
    refusal = said(["export", run, "--to", "onnx", "--fp16", "--out", str(out)], capsys, 2)
    assert "backbone_fp16.onnx there was not written by mhe export" in refusal
    assert contents(out) == {"backbone_fp16.onnx": b"of the user"}


@pytest.mark.parametrize("name", ALL)
def test_an_export_that_was_broken_off_may_be_repeated(
    name: ExportFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(_: TrainedModel, path: str, *__: object) -> float:
        below = [file.partition("/")[2] for file in EARLIER[name]]
        if below == [""]:
            Path(path).touch()
        else:
            write(Path(path), below)
        return 0.0

    def break_off(*_: object) -> None:
        raise KeyboardInterrupt

    trained = model_of(tmp_path)
    monkeypatch.setitem(exports._WRITERS, name, break_off)
    with pytest.raises(KeyboardInterrupt):
        write_format(name, trained, str(tmp_path), IMAGES)
    assert contents(tmp_path) == {}
    monkeypatch.setitem(exports._WRITERS, name, made)
    monkeypatch.setattr(output_folder, "write_model_card", break_off)
    with pytest.raises(KeyboardInterrupt):
        write_format(name, trained, str(tmp_path), IMAGES)
    refuse_overwriting(str(tmp_path), [name])


def test_a_folder_that_was_broken_off_before_its_card_may_be_replaced(tmp_path: Path) -> None:
    """In a store its files arrive one after the other."""
    for name, folder in (("timm", "timm"), ("hub-folder", "hub"), ("mlflow", "mlflow")):
        write(tmp_path, [f"{folder}/config.json", f"{folder}/model.safetensors"])
        with pytest.raises(UserError, match=f": {folder}/ there was not written"):
            refuse_overwriting(str(tmp_path), [name])
        about = json.dumps({folder: {"format": name}})
        (tmp_path / "exports.json").write_text(about)
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
