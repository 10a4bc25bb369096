"""`mhe init`: what a user has becomes a run that passes the checks before it."""

from __future__ import annotations

import shlex
from pathlib import Path

import fsspec
import pytest

from launcher import cli
from launcher.preflight.checks import check_data, check_names
from launcher.preflight.own_data import survey_data
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config
from pipelines.shards.index import ShardIndex
from tests.support import tiny
from tests.support.data.images import jpeg
from tests.support.data.recordio_files import items, layout, save

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 classes of three images of 40 pixels."""
    monkeypatch.chdir(tmp_path)
    for label in range(24):
        Path("photos", f"c{label}").mkdir(parents=True)
        for number in range(3):
            Path("photos", f"c{label}", f"{number}.jpg").write_bytes(jpeg(3 * label + number, 40))
    return tmp_path / "photos"


def init(*words: str) -> Config:
    assert cli.run(["init", *words, "--workers", "2", "--no-gpu"]) == 0
    return load_config("photos.yaml")


def make_shards() -> None:
    """Run the command that the file names."""
    (line,) = [li for li in Path("photos.yaml").read_text().splitlines() if "# Shards:" in li]
    words = shlex.split(line.partition(": ")[2])
    assert words[0] == "mhe" and cli.run([*words[1:], "--processes", "1"]) == 0


def test_a_folder_of_images(photos: Path, capsys: Captured) -> None:
    config = init("photos")
    said = " ".join(capsys.readouterr().out.split())
    assert "66 images of about 40 pixels in 22 classes to train on, and 2 CPU workers" in said
    assert "mhe data folder --root photos --out data/photos --heldout-classes 2" in said
    assert (config.data.image_size, config.head.kind, config.scale.workers) == (32, "full", 2)
    make_shards()
    load_config("photos.yaml", [], [check_data, check_names])
    assert ShardIndex.load(config.data.shards).num_classes == 22
    assert ShardIndex.load(config.evaluate.shards).num_classes == 2
    assert cli.run(["init", "photos"]) == 2
    assert "photos.yaml: exists already" in capsys.readouterr().err
    # Shards that are there need no command, and the same file comes out but for that.
    again = Path("photos.yaml")
    again.unlink()
    assert init("data/photos") == config
    assert "Shards:" not in again.read_text()


def test_it_passes_preflight(photos: Path) -> None:
    init("photos")
    make_shards()
    assert cli.run(["preflight", "photos.yaml", "--no-trial"]) == 0


def test_a_table(photos: Path) -> None:
    rows = [f"photos/c{n % 24}/{n // 24}.jpg,{n % 23}" for n in range(72)]
    Path("photos.csv").write_text("\n".join(["path,class", *rows, ""]))
    config = init("photos.csv")
    make_shards()
    load_config("photos.yaml", [], [check_data])
    assert config.data.image_size == 32
    assert ShardIndex.load(config.data.shards).num_classes == 21


def test_recordio(photos: Path) -> None:
    rec = save(photos.parent / "photos_rec", *layout(items(3, 4), "classic"))
    words = ["init", rec, "--name", "photos", "--workers", "2", "--no-gpu"]
    assert cli.run(words) == 2
    assert cli.run([*words, "--classes", "3"]) == 0
    Path("photos.yaml").unlink()
    Path(rec).with_name("property").write_text("3,112,112\n")
    assert cli.run(words) == 0
    text = Path("photos.yaml").read_text()
    assert "12 images of about 112 pixels in 3 classes" in " ".join(text.replace("#", "").split())
    make_shards()
    assert load_config("photos.yaml", [], [check_data]).data.shards == "data/photos_rec"


def test_images_without_classes(photos: Path, capsys: Captured) -> None:
    """The first file of docs/unlabelled.md was one that nothing made."""
    words = ["data", "folder", "--root", "photos", "--no-classes", "--out", "data/photos"]
    assert cli.run([*words, "--processes", "1"]) == 0
    assert cli.run(["init", "data/photos"]) == 2
    assert "say with --classes N how many mhe cluster shall" in capsys.readouterr().err
    config = init("data/photos", "--classes", "6")
    assert (config.data.labels, config.data.labels_per_sample) == ("data/photos-1", 8)
    assert "72 images of about 40 pixels in 6 classes" in capsys.readouterr().out
    (line,) = [li for li in Path("photos.yaml").read_text().splitlines() if "# Classes:" in li]
    command = shlex.split(line.partition(": ")[2])[1:]
    assert cli.run([*command, "--workers", "1", "--no-gpu"]) == 0
    assert "mhe train photos.yaml data.shards=data/photos" in capsys.readouterr().out
    load_config("photos.yaml", [], [check_data, check_names])
    assert cli.run(["preflight", "photos.yaml", "--no-trial"]) == 0


def test_held_out_images_of_the_same_classes_are_classified(photos: Path) -> None:
    """They were looked up as classes that training never sees."""
    words = ["data", "folder", "--root", "photos", "--heldout-images", "2", "--out", "data/photos"]
    assert cli.run([*words, "--processes", "1"]) == 0
    config = init("data/photos")
    assert config.evaluate.classification == "data/photos/heldout"
    assert config.evaluate.shards == ""


def test_tars_of_others(photos: Path) -> None:
    init("photos")
    make_shards()
    Path("photos.yaml").unlink()
    theirs = Path("theirs")
    Path("data/photos/train").rename(theirs)
    for name in ("index.json", "begins.npy", "labels.npy", "classes.tsv"):
        (theirs / name).unlink()
    config = init("theirs", "--name", "photos", "--classes", "22")
    make_shards()
    load_config("photos.yaml", [], [check_data])
    assert config.data.shards == "theirs"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--heldout", "nowhere"],
            "evaluate.shards=nowhere (command line): there is no such folder; give a",
        ),
        (["--name", "a/b", "--out", "photos.yaml"], "run.name=a/b (command line)"),
        (["--out", "/proc/photos.yaml"], "nothing can be made below /proc/; give another path"),
    ],
)
def test_settings_that_are_refused_leave_no_file(
    photos: Path, options: list[str], message: str, capsys: Captured
) -> None:
    init("photos")
    make_shards()
    Path("photos.yaml").unlink()
    assert cli.run(["init", "data/photos", "--workers", "2", "--no-gpu", *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("photos.yaml").exists()


def test_the_folder_of_the_file_is_made(photos: Path) -> None:
    assert cli.run(["init", "photos", "--out", "made/here/a.yaml"]) == 0
    assert Path("made/here/a.yaml").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "no such folder"),
        (["foo://x"], "foo://x: Protocol not known"),
        (["/"], "/: is the root of a disk or store; give mhe init a folder"),
        (["photos", "--out", "memory://b/x.yaml"], "--out memory://b/x.yaml: mhe train reads"),
        (["empty"], "empty: holds no image"),
        (["photos/c0"], "3 images lie in no class folder"),
        (["photos/c0"], "--root photos/c0 --no-classes --out data/c0, then "),
        (["$set"], "$set: in a config $ begins a variable; give the folder another name, or"),
        (["theirs"], "theirs: the number of classes is not known (only reading the tars"),
        (["bad.csv"], "has no column 'path'"),
        (
            ["bad.yaml"],
            "bad.yaml: is a file of no kind that mhe init knows; give mhe init a folder",
        ),
        (["photos", "--root", "photos"], "photos is a folder of images; leave it out"),
        (["photos", "--classes", "7"], "--classes 7: photos says its classes itself"),
        (["one"], "one: its images are all of one class, 'a', and a classifier needs two"),
    ],
)
def test_mistakes(photos: Path, capsys: Captured, words: list[str], message: str) -> None:
    Path("empty").mkdir()
    Path("a $HOME").symlink_to("photos")
    assert cli.run(["init", "a $HOME", "--out", "named.yaml"]) == 0  # its shards are data/a_HOME
    tiny.write_shards("$set")
    Path("theirs").mkdir()
    Path("theirs/a.tar").write_bytes(b"")
    Path("bad.csv").write_text("a,b\n")
    Path("bad.yaml").write_text("run: {name: a}\n")
    Path("one/a").mkdir(parents=True)
    Path("one/a/0.jpg").write_bytes(jpeg(0, 40))
    assert cli.run(["init", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_name_beyond_ascii_is_written_as_it_is(tmp_path: Path, capsys: Captured) -> None:
    folder, file = tiny.write_shards(tmp_path / "Größe"), tmp_path / "a.yaml"
    assert cli.run(["init", folder, "--workers", "2", "--no-gpu", "--out", str(file)]) == 0
    assert f"shards: {folder}\n" in file.read_text(encoding="utf-8")


def test_what_lies_at_a_url_is_known_as_here(photos: Path) -> None:
    """Half of the ways took a URL for a path: `memory:/b`, and a property that was not there."""
    store = fsspec.filesystem("memory")
    store.put(str(photos), "/own-data/photos", recursive=True)
    rows = [f"photos/c{label}/0.jpg,c{label}" for label in range(24)]
    store.pipe("/own-data/table.csv", "\n".join(["path,class", *rows, ""]).encode())
    found = survey_data("memory://own-data/table.csv")
    assert (found.side, found.command[4]) == (40, "memory://own-data")
    rec = save(photos.parent / "rec", *layout(items(3, 4), "classic"))
    Path(rec).with_name("property").write_text("3,112,112\n")
    store.put(str(photos.parent / "rec"), "/own-data/rec", recursive=True)
    for source in ("memory://own-data/rec", f"memory://own-data/rec/{Path(rec).name}"):
        found = survey_data(source)
        assert (found.kind, found.classes, found.images, found.side) == ("RecordIO", 3, 12, 112)
    store.pipe("/own-data/tars/a.tar", b"")
    assert survey_data("memory://own-data/tars", classes=9).kind == "tars"
