"""Runs on disk are found, and what they hold is read."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from launcher import cli
from mhe_dist.backbone.model import build_backbone
from mhe_dist.backbone.pretrained import load_pretrained
from mhe_dist.checkpoint.files import CheckpointFolder, FileEntry
from mhe_dist.config.schema import Config
from mhe_dist.errors import UserError
from pipelines.runs.folder import (
    absolute_path,
    find_run,
    logs_folder,
    make_run_folder,
    newest_checkpoint,
    read_heldout_figures,
    read_if_exists,
    read_run_config,
    read_summary,
)
from pipelines.runs.warm_start import find_checkpoint
from tests.support import tiny
from tests.support.servers.stores import s3_bucket


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {name: first}")
    return folder


def test_a_run_is_found_by_path_or_by_name(run: Path) -> None:
    assert find_run("first") == "runs/first"
    assert find_run("runs/first/") == "runs/first"
    assert find_run(str(run)) == str(run)


def test_a_run_that_is_not_there_is_told_with_the_places(run: Path) -> None:
    with pytest.raises(UserError, match=r"no run at second or runs/second"):
        find_run("second")


def test_settings_and_summary(run: Path) -> None:
    assert read_run_config(str(run)) == {"run": {"name": "first"}}
    assert read_run_config("runs/second") is None
    assert read_summary(str(run)) is None
    (run / "summary.json").write_text(json.dumps({"steps": 5}))
    assert read_summary(str(run)) == {"steps": 5}


def test_held_out_figures_are_those_of_the_run_s_own_set(run: Path) -> None:
    """The card of an export had those of whatever set `mhe evaluate --shards` named last."""
    (run / "config.yaml").write_text("evaluate: {shards: data/heldout}")
    summary = {"steps": 5, "heldout": {"rank1": 0.97}, "protocol": "at the end"}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "evaluation").mkdir()
    for shards, expected in (("data/other", (0.97, "at the end")), ("data/heldout", (0.41, "now"))):
        results = {"shards": shards, "rank1": 0.41, "protocol": "now"}
        written = json.dumps({"step": 5, "results": results})
        (run / "evaluation" / "heldout.json").write_text(written)
        figures, protocol = read_heldout_figures(str(run), 5)
        assert (figures["rank1"], protocol) == expected
    assert read_heldout_figures(str(run), 6) == ({}, "")


def test_only_a_manifest_makes_a_checkpoint(run: Path) -> None:
    assert newest_checkpoint(str(run)) is None
    for step in (5, 10, 15):
        (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    for step in (5, 10):
        (run / "checkpoints" / f"step_{step:08d}" / "manifest.json").touch()
    assert newest_checkpoint("runs/first") == "runs/first/checkpoints/step_00000010"


def test_logs_lie_in_the_run_or_beside_a_remote_one(run: Path) -> None:
    def logs(folder: str) -> Path:
        settings = {"run": {"name": "first", "dir": folder}, "data": {"shards": "x"}}
        return logs_folder(Config.model_validate(settings))

    assert logs("runs") == run / "logs"
    assert logs("memory://bucket").parts[-2:] == ("mhe-logs", "first")


def test_absolute_leaves_urls_alone(run: Path) -> None:
    assert absolute_path("runs/first") == str(run)
    assert absolute_path("memory://bucket/a") == "memory://bucket/a"


@pytest.mark.parametrize(
    ("folder", "path"),
    [
        ("file://{here}/a", "{here}/a"),
        ("file:a", "{here}/a"),
        ("C:\\runs", "{here}/C:\\runs"),  # as a name of a file on Linux
        ("C:/runs", "{here}/C:/runs"),
    ],
)
def test_a_folder_of_this_machine_however_it_is_written(run: Path, folder: str, path: str) -> None:
    here = Path.cwd()
    assert absolute_path(folder.format(here=here)) == path.format(here=here)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nosuch://a", "Protocol not known: nosuch"),
        ("http://host:99999/a", "is no address of a server"),
    ],
)
def test_a_place_that_nothing_can_reach(
    url: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config.model_validate({"data": {"shards": "x"}, "run": {"dir": url}})
    for function in (absolute_path, find_run, read_if_exists):
        with pytest.raises(UserError, match=f"^{url}.*: {reason}"):
            function(url)
    with pytest.raises(UserError, match=f"^{url}/run: {reason}"):
        logs_folder(config)
    with pytest.raises(UserError, match=f"^run.dir={url}: {url}/run: {reason}.*another folder"):
        make_run_folder(config)
    assert cli.run(["report", url]) == 2
    assert reason in " ".join(capsys.readouterr().err.split())


def test_a_url_is_looked_for_where_it_says(run: Path) -> None:
    for url in (f"file://{run.parent}/second", f"{run.parent}/second"):
        with pytest.raises(UserError, match=f"^no run at {run.parent}/second "):
            find_run(url)


@pytest.mark.parametrize(
    "words",
    [
        ["checkpoint", "inspect", "{step}"],
        ["checkpoint", "verify", "{step}"],
        ["evaluate", "{step}"],
        ["export", "{step}"],
        ["classify", "{step}", "--images", "photos"],
        ["embed", "{step}", "--images", "{shards}", "--out", "made"],
        ["cluster", "{shards}", "--model", "{step}", "--classes", "3", "--out", "made"],
        ["audit", "{step}", "--shards", "{shards}"],
        ["preflight", "{config}", "head.init_from={step}"],
        ["preflight", "{config}", "model.init_from={step}"],
    ],
)
def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(
    run: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tiny.write_shards(tmp_path / "tiny")
    settings = tiny.trained_run(run.parent, shards, run={"dir": str(run.parent), "name": "first"})
    places = {
        "step": f"{settings.run.path}/checkpoints/step_00000023/",
        "shards": shards,
        "config": f"{run}/config.yaml",
    }
    assert cli.run([word.format(**places) for word in words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "holds step_00000024" in said
    assert "Errno" not in said


def test_a_run_that_would_begin_with_no_such_checkpoint(run: Path) -> None:
    """A checkpoint may be deleted after the settings were checked, and torchrun checks none."""
    config = tiny.trained_run(run.parent, "tiny", run={"dir": str(run.parent), "name": "first"})
    gone = f"{config.run.path}/checkpoints/step_00000023"
    words = r"no such checkpoint; .* holds step_00000024"
    with pytest.raises(UserError, match=words):
        find_checkpoint(gone)
    with pytest.raises(UserError, match=words):
        load_pretrained(build_backbone(config.model, tiny.SIDE), gone)


def test_verify_reads_the_newest_checkpoint_and_names_what_is_damaged(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["checkpoint", "verify", "first"]) == 2
    assert "no complete checkpoint yet" in capsys.readouterr().err
    for step in (10, 20):
        folder = run / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "0.distcp").write_bytes(b"rows")
        entry = FileEntry(4, f"{zlib.crc32(b'rows'):08x}")
        CheckpointFolder(str(folder)).write_manifest({"0.distcp": entry}, {"step": step})
    assert cli.run(["checkpoint", "verify", "first"]) == 0
    assert "2 files" in capsys.readouterr().out
    (run / "checkpoints" / "step_00000020" / "0.distcp").write_bytes(b"rots")
    assert cli.run(["checkpoint", "verify", "first"]) == 1
    said = capsys.readouterr().err
    assert "step_00000020" in said
    assert "0.distcp has CRC-32" in said
    assert cli.run(["checkpoint", "verify", str(run / "checkpoints" / "step_00000010")]) == 0


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("{tmp}/file/runs", "cannot be made (Not a directory)"),
        ("/proc/runs", "cannot be made (No such file or directory)"),
        ("{tmp}/loop/runs", "cannot be made (Too many levels of symbolic links)"),
        ("http://127.0.0.1:1/runs", "a web server takes no files"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, folder: str, reason: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    folder = folder.format(tmp=tmp_path)
    config = Config.model_validate({"data": {"shards": "x"}, "run": {"dir": folder}})
    with pytest.raises(UserError, match=re.escape(f"run.dir={folder}: ")) as refusal:
        make_run_folder(config)
    assert reason in str(refusal.value)
    assert str(refusal.value).endswith("; name another folder with run.dir")


def test_a_folder_without_rights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.model_validate({"data": {"shards": "x"}, "run": {"dir": str(tmp_path)}})
    make_run_folder(config)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match="may not be written; name another folder"):
        make_run_folder(config)


class _Guarded(MemoryFileSystem):
    """A store that refuses to be written, or fails for the moment."""

    protocol = "guarded"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    error: ClassVar[Exception | None] = None

    def pipe_file(self, path: str, value: bytes, **more: Any) -> None:
        if self.error is not None:
            raise self.error
        super().pipe_file(path, value, **more)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError("Access Denied"), "(Access Denied); name another"),
        (FileNotFoundError("The specified bucket does not exist"), "(The specified bucket does"),
        (ConnectionResetError(), ""),
        (None, ""),
    ],
)
def test_a_store_that_takes_no_files_is_refused(
    error: Exception | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not answer may be there again when something is written."""
    fsspec.register_implementation("guarded", _Guarded, clobber=True)
    monkeypatch.setattr(_Guarded, "error", error)
    url = "guarded://bucket/runs"
    config = Config.model_validate({"data": {"shards": "x"}, "run": {"dir": url, "name": "a"}})
    if not reason:
        make_run_folder(config)
        assert not _Guarded.store
        return
    with pytest.raises(UserError, match=re.escape(f"{url}/a cannot be written {reason}")):
        make_run_folder(config)


@pytest.mark.slow
def test_a_bucket_without_rights_is_told_as_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    denied = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject"}
    statement = denied | {"Resource": "arn:aws:s3:::readable/*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    with s3_bucket("readable"):
        fsspec.filesystem("s3").call_s3("put_bucket_policy", Bucket="readable", Policy=policy)
        for bucket in ("readable", "nowhere"):
            folder = f"s3://{bucket}/runs"
            assert cli.run(["train", "quickstart", f"run.dir={folder}"]) == 2
            said = " ".join(capsys.readouterr().err.split())
            assert f"run.dir={folder}: {folder}/quickstart cannot be written" in said


@pytest.mark.parametrize("folder", ["/proc/runs", "nosuch://bucket"])
def test_train_refuses_it_before_anything_is_begun(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def begun(*_: object) -> None:
        raise AssertionError("something was begun")

    monkeypatch.setattr("launcher.execute.make_data", begun)
    monkeypatch.setattr("launcher.execute.train_locally", begun)
    assert cli.run(["train", "quickstart", f"run.dir={folder}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert folder in line
