"""The `mhe data` verbs: what they make, what they say, and their exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from launcher import cli
from launcher.verbs.data import check
from pipelines.shards.index import ShardIndex
from pipelines.sources import insightface
from pipelines.sources.label_table.keys import read_keys
from tests.support.data.images import jpeg
from tests.support.data.recordio_files import items, layout, save
from tests.support.data.shard_sets import PACKED

Captured = pytest.CaptureFixture[str]
FOLDER = ["folder", "--root", "made", "--out", "out"]


@pytest.fixture
def faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return save(tmp_path / "faces", *layout(items(), "classic"))


def run(*words: str) -> int:
    alone = [] if "show" in words or "diff" in words else ["--processes", "1"]
    return cli.run([*words, *alone])


def test_records_to_shards_to_a_clean_report(faces: str, capsys: Captured) -> None:
    assert run("data", "recordio", "--rec", faces, "--out", "made") == 0
    said = capsys.readouterr().out
    assert "12 images of 3 classes, 1 tar," in said
    assert "mhe data verify" in said
    assert run("data", "verify", "made") == 0
    assert "Nothing is wrong." in capsys.readouterr().out
    assert json.loads(Path("verify/made.json").read_text())["good"]
    assert Path("verify/made.png").exists()
    assert [path.name for path in Path("verify").iterdir() if path.name.startswith(".")] == []
    assert run("data", "show", "made", "--out", "a.png", "--classes", "2", "--images", "2") == 0
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    assert run("data", "recordio", "--rec", faces, "--out", "made") == 2
    assert "already exists" in capsys.readouterr().err


def test_a_folder_and_a_list(tmp_path: Path, faces: str, capsys: Captured) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg"):
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        Path("photos", name).write_bytes(jpeg(int(name[2])))
    Path("photos", "notes.txt").write_text("no image")
    Path("train.lst").write_text("0\t5\ta/1.jpg\n1\t9\tb/3.jpg\n")
    assert run("data", "folder", "--root", "photos", "--out", "one") == 0
    assert "1 files do not end like an image" in capsys.readouterr().out
    assert run("data", "folder", "--root", "photos", "--out", "two", "--lst", "train.lst") == 0
    assert "2 images of 2 classes" in capsys.readouterr().out
    Path("one", "index.json").unlink()
    Path("one", "classes.tsv").unlink()
    assert run("data", "index", "one", "--image", ".JPG, png") == 0
    assert ShardIndex.load("one").image_extensions == ("jpg", "png")


def test_a_split_folder_says_how_to_train_and_a_classless_one_how_to_begin(
    faces: str, capsys: Captured
) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg", "b/4.jpg", "c/5.jpg"):
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        Path("photos", name).write_bytes(jpeg(int(name[2])))
    words = ["data", "folder", "--root", "photos", "--out"]
    assert run(*words, "made", "--heldout-classes", "1") == 0
    said = capsys.readouterr().out
    assert "made/heldout: 2 images of 1 class, 1 tar" in said
    assert "a config for it" in said and re.search(r"mhe init made$", said, re.MULTILINE)
    Path("made.yaml").write_text("data: {shards: made/train}\n")  # as `mhe init photos` names them
    shutil.rmtree("made")
    assert run(*words, "made", "--heldout-classes", "1") == 0
    assert re.search(r"mhe train made.yaml$", capsys.readouterr().out, re.MULTILINE)
    Path("made.yaml").write_text("data: {shards: other/train}\n")
    shutil.rmtree("made")
    assert run(*words, "made", "--heldout-classes", "1") == 0
    assert re.search(r"mhe init made$", capsys.readouterr().out, re.MULTILINE)
    assert run(*words, "all", "--no-classes") == 0
    said = capsys.readouterr().out
    assert "all: 5 images in no class, 1 tar" in said and "mhe train" not in said
    assert "mhe init all --classes N" in said
    assert run("data", "verify", "all") == 0
    said = capsys.readouterr().out
    assert "mhe init all --classes N" in said and "median" not in said


def test_what_is_wrong_with_the_data_is_exit_code_1(faces: str, capsys: Captured) -> None:
    assert run("data", "recordio", "--rec", faces, "--out", "made") == 0
    tar = Path("made", "recordio-000000.tar")
    tar.write_bytes(tar.read_bytes()[:9000])
    capsys.readouterr()
    assert run("data", "verify", "made", "made") == 1
    said = capsys.readouterr().out
    assert "has 9000 bytes, the index says" in said
    assert "Something is wrong." in said
    assert Path("verify", "made-1.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify", "nowhere"], "no shards here"),
        (["show", "nowhere"], "no shards here"),
        (["show", "."], "give one of the folders in it that are data sets: ./made"),
        (["verify", "tars"], "its tars get one with: mhe data index tars"),
        (
            ["folder", "--root", "photos", "--out", "notes/x"],
            "a file stands where a folder is needed",
        ),
        (["folder", "--root", "photos", "--out", "n" * 300 + "/x"], "the name is too long"),
        (["show", "made", "--out", "sheet.jpg"], "let its name end with .png"),
        (["index", "nowhere"], "no tars here"),
        (["folder", "--root", "nowhere", "--out", "out"], "no such folder"),
        ([*FOLDER, "--lst", "a", "--table", "b"], "--lst and --table exclude each other"),
        (
            [*FOLDER, "--heldout-images", "2", "--no-classes"],
            "--heldout-images and --no-classes exclude each other",
        ),
        ([*FOLDER, "--heldout-images", "1"], "--heldout-images 1: a class needs two"),
        (["recordio", "--rec", "nowhere.rec", "--out", "out"], "cannot be opened"),
        (["recordio", "--rec", "faces/", "--out", "out"], "give the file in it: faces/train.rec"),
        (["recordio", "--rec", "photos", "--out", "out"], "give the .rec file of the data set"),
        (
            ["recordio", "--rec", "faces/train.idx", "--out", "out"],
            "faces/train.idx: is no RecordIO file (no record begins at byte 0); give the .rec file",
        ),
    ],
)
def test_mistakes(faces: str, capsys: Captured, words: list[str], message: str) -> None:
    for name, content in {
        "made/index.json": b"{}",
        "tars/0.tar": b"",
        "notes": b"",
        "photos/a/1.jpg": jpeg(1),
        "photos/b/1.jpg": jpeg(2),
    }.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    assert run("data", *words) == 2
    assert message in capsys.readouterr().err


def test_after_a_refusal_the_cure_can_be_typed(faces: str, capsys: Captured) -> None:
    """What was refused at its end was not interrupted: other settings, or mended images, go."""
    for number in range(1, 13):
        image = Path("photos", "ab"[number % 2], f"{number}.jpg")
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(jpeg(number))
    Path("photos/a/0.jpg").touch()
    assert run("data", "folder", "--root", "photos", "--out", "set", "--shard-mib", "0.01") == 1
    assert "photos/a/0.jpg: 0 bytes long" in capsys.readouterr().err
    assert len(list(Path(".set.partial").glob("*.tar"))) > 1
    Path("photos/a/0.jpg").unlink()
    assert run("data", "folder", "--root", "photos", "--out", "set") == 0
    assert len(list(Path("set").glob("*.tar"))) == 1  # nothing of the other attempt
    Path("set/index.json").unlink()
    Path("set/classes.tsv").unlink()
    assert run("data", "index", "set", "--label", "name") == 1
    assert "say which is the label: --label cls" in capsys.readouterr().err
    assert run("data", "index", "set", "--label", "cls") == 0


def test_an_interruption_says_how_to_go_on(
    faces: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(insightface, "_scan", interrupted)
    monkeypatch.setattr("sys.argv", ["mhe", "data", "recordio", "--rec", faces, "--out", "x"])
    assert run("data", "recordio", "--rec", faces, "--out", "x") == 130
    said = capsys.readouterr().out
    assert "the same command goes on" in said
    assert f"mhe data recordio --rec {faces} --out x" in said


def test_an_index_of_before_is_converted_and_damaged_columns_are_mended(
    faces: str, capsys: Captured
) -> None:
    shutil.copytree(PACKED / "foreign", "old")  # without its tars
    assert run("data", "index", "old") == 0
    assert "its index has columns now; no tar was read" in capsys.readouterr().out.replace(
        "\n", " "
    )
    assert not ShardIndex.load("old").is_packed
    assert run("data", "index", "old") == 2  # nothing to renew, and no tar to index
    capsys.readouterr()
    assert run("data", "recordio", "--rec", faces, "--out", "made") == 0
    Path("made/labels.npy").unlink()
    assert run("data", "verify", "made") == 2
    assert "mhe data index made" in capsys.readouterr().err.replace("\n", " ")
    assert run("data", "index", "made") == 0
    assert run("data", "verify", "made") == 0


def test_labels_from_a_table_are_shown_and_compared(faces: str, capsys: Captured) -> None:
    assert run("data", "recordio", "--rec", faces, "--out", "made") == 0
    keys = read_keys(ShardIndex.load("made"), 0, 0, 12)
    rows = [f"{key},{'even' if number % 2 else 'odd'}" for number, key in enumerate(keys[1:])]
    Path("a.csv").write_text("\n".join(["key,class", *rows, "none,odd", f"{keys[2]},odd"]))
    words = ["--shards", "made", "--out", "made-a"]
    assert run("data", "labels", "from-table", "a.csv", *words) == 2
    assert "1 of 13 rows name no sample" in capsys.readouterr().err.replace("\n", " ")
    huge = ("--num-classes", str(10**20))
    assert run("data", "labels", "from-table", "a.csv", *words, *huge) == 2
    assert "Invalid value for '--num-classes'" in capsys.readouterr().err
    assert run("data", "labels", "from-table", "a.csv", *words, "--max-bad", "0.1") == 0
    said = capsys.readouterr().out
    assert "11 of 12 samples have classes, of 2, up to 2 of them each" in said
    assert "1 rows name no sample of the data set" in said
    assert "a.csv: row 12: none is no sample of the data set" in said
    assert "1 samples are named by no row" in said
    assert "mhe train CONFIG data.shards=made data.labels=made-a" in said
    assert run("data", "labels", "show", "made-a") == 0
    said = capsys.readouterr().out
    assert "mhe train CONFIG data.shards=made data.labels=made-a" in said
    assert "digest: sha256:" in said and "7 of 1 (odd)" in said
    rows[0] = f"{keys[1]},even"
    Path("b.csv").write_text("\n".join(["key,class", *rows]))
    words = ["--shards", "made", "--out", "made-b"]
    assert run("data", "labels", "from-table", "b.csv", *words) == 0
    assert run("data", "labels", "diff", "made-a", "made-b", "--samples", "1") == 0
    said = capsys.readouterr().out
    assert "samples with other classes      2" in said
    assert said.count("->") == 1
    Path("made-b/class_ids.npy").write_bytes(Path("made-b/class_ids.npy").read_bytes()[:-1] + b"x")
    assert run("data", "labels", "show", "made-b") == 1
    assert "class_ids.npy is damaged" in capsys.readouterr().out.replace("\n", " ")


def test_every_report_has_a_name_of_its_own() -> None:
    assert check._names(["x/a", "y/a-2", "z/a", "w/a"]) == ["a", "a-2", "a-3", "a-4"]
