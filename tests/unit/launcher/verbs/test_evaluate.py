"""`mhe evaluate ...` on a run with a checkpoint: tables, files, mistakes."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from pipelines.data.decode import decode_image
from pipelines.embedding.embed import read_embeddings
from pipelines.embedding.folder import EmbeddingsFolder
from pipelines.evaluate import approximate, search
from pipelines.evaluate.metrics import bootstrap
from pipelines.runs.trained import load_trained_backbone
from tests.support import tiny
from tests.support.data.ijb_set import write_ijb_set
from tests.support.terminal import said

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a run whose held-out set is there."""
    folder = tmp_path_factory.mktemp("runs")
    shards = tiny.write_shards(folder / "heldout", classes=8, first=10_000)
    return tiny.trained_run(folder, shards, evaluate={"shards": shards}).run.path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of each of four classes."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in "abcd":
        (root / name).mkdir()
        pattern = rng.integers(0, 256, (4, 4, 3))
        for number in range(6):
            noisy = (pattern + rng.normal(0, 20, (4, 4, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).resize((20, 18)).save(root / name / f"{number}.jpg")
    (root / "readme.txt").write_text("no image")
    return root


def test_a_run_alone_means_its_heldout_shards(run: str, capsys: Captured) -> None:
    short = said(["evaluate", run], capsys)
    assert short == said(["evaluate", "heldout", run], capsys)
    named = said(["evaluate", f"{run}/checkpoints/step_00000024"], capsys)
    assert named.split("rank-1")[1].split("Next")[0] == short.split("rank-1")[1].split("Next")[0]
    for part in ("rank-1", "(chance 12.50%)", "TAR@FAR=1E-3", "probes", "88"):
        assert part in short
    assert "protocol of rank-1, TAR" in short
    saved = json.loads(Path(run, "evaluation", "heldout.json").read_text())["results"]
    in_order = "enrolled: the first image of each class in the order of the shards"
    assert saved["protocol"] == in_order


def test_verification_sets(
    run: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "DRAWS", 5)
    sets = [tiny.write_bin(tmp_path / name) for name in ("lfw.bin", "cfp_fp.bin")]
    shown = said(["evaluate", "verification", run, "--sets", *sets], capsys)
    for part in ("lfw", "cfp_fp", "ACCURACY", "TAR@FAR=1E-3", "evaluation/verification.json"):
        assert part.lower() in shown.lower()
    found = json.loads(Path(run, "evaluation", "verification.json").read_text())
    assert found["step"] == 24
    assert found["results"]["lfw"] == found["results"]["cfp_fp"]
    assert found["results"]["lfw"]["pairs"] == 40
    assert Path(run, "evaluation", "verification.png").read_bytes()[:4] == b"\x89PNG"


def test_ijb(run: str, tmp_path: Path, capsys: Captured) -> None:
    root = str(write_ijb_set(tmp_path / "IJBC"))
    shown = said(["evaluate", "ijb", run, "--root", root], capsys)
    for part in ("TAR@FAR=1e-06", "1:N rank-1", "TPIR@FPIR=0.01", "evaluation/ijbc.json"):
        assert part in shown
    found = json.loads(Path(run, "evaluation", "ijbc.json").read_text())["results"]
    assert found["templates"] == 32
    assert found["tar@far=1e-6"] <= found["tar@far=1e-1"]


def test_own_images(run: str, photos: Path, tmp_path: Path, capsys: Captured) -> None:
    words = ["evaluate", "identification", run, "--images", str(photos), "--all-pairs"]
    shown = said(words, capsys)
    parts = (
        "rank-1",
        "TAR@FAR=1E-2",
        "all pairs: TAR@FAR=1E-6",
        "genuine",
        "evaluation/identification.json",
    )
    for part in (*parts, f"mhe report {run}", f"mhe export {run}/checkpoints/step_"):
        assert part in shown
    found = json.loads(Path(run, "evaluation", "identification.json").read_text())["results"]
    assert (found["gallery"], found["probes"]) == (4, 20)
    by_name = "enrolled: the first image of each class by file name"
    assert found["protocol"] == by_name
    assert f"protocol of rank-1, TAR {by_name}" in " ".join(shown.replace("│", " ").split())
    assert (found["genuine"], found["impostors"]) == (4 * 15, 6 * 36)
    shards = Path(run).parent / "heldout"
    assert "rank-1" in said(["evaluate", "identification", run, "--images", str(shards)], capsys)


def test_an_image_that_is_none_is_a_mistake(run: str, photos: Path, capsys: Captured) -> None:
    bad = photos / "b" / "bad.jpg"
    bad.write_bytes(b"no image")
    shown = said(["evaluate", "identification", run, "--images", str(photos)], capsys, 2)
    bad.unlink()
    assert f"{bad}: cannot be read: no image of a known format; mend the file" in shown


def test_a_probe(run: str, photos: Path, capsys: Captured) -> None:
    words = ["evaluate", "probe", run, "--images", str(photos), "--k", "3"]
    assert "majority 20.00" in " ".join(said(words, capsys).replace("│", "").split())
    assert "linear" in said([*words, "--test", str(photos)], capsys)
    other = str(Path(run).parent / "heldout")
    assert f"--test {other}: its class" in said([*words, "--test", other], capsys, 2)


def test_pairs_of_a_table(
    run: str, photos: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "DRAWS", 5)
    rows = [f"a/{i % 6}.jpg,{'a' if i % 2 else 'b'}/{i % 5}.jpg,{i % 2}" for i in range(30)]
    table = tmp_path / "mine.csv"
    table.write_text("\n".join(["first,second,same", *rows]))
    words = ["evaluate", "verification", run, "--pairs", str(table), "--images", str(photos)]
    assert "mine" in said(words, capsys)
    for row, why in (("a/0.jpg,../x.jpg,1", "leaves the folder"), ("a/0.jpg,a/1.jpg,2", "0 or 1")):
        table.write_text("\n".join(["first,second,same", row]))
        message = said(words, capsys, 2)
        assert "mine.csv line 2" in message
        assert why in message
    table.write_text("first,same")
    assert "has no column 'second'" in said(words, capsys, 2)


def test_a_table_and_a_set_of_one_name_would_share_their_figures(
    run: str, photos: Path, tmp_path: Path, capsys: Captured
) -> None:
    """Those of the table took the place of the set's."""
    table, file = tmp_path / "pairs.csv", tiny.write_bin(tmp_path / "pairs.bin")
    rows = [f"a/{i % 6}.jpg,{'a' if i % 2 else 'b'}/{i % 5}.jpg,{i % 2}" for i in range(30)]
    table.write_text("\n".join(["first,second,same", *rows]))
    words = ["evaluate", "verification", run, file, "--pairs", str(table), "--images", str(photos)]
    message = "two verification sets are called pairs: rename one of the files"
    assert message in said(words, capsys, 2)


def test_embeddings_in_a_file(run: str, photos: Path, tmp_path: Path, capsys: Captured) -> None:
    bad = photos / "b" / "bad.jpg"
    bad.write_bytes(b"no image")
    out = tmp_path / "out" / "photos.npz"
    words = ["embed", run, "--images", str(photos), "--out", str(out), "--normalize"]
    shown = said(words, capsys)
    bad.unlink()
    assert "24 embeddings of 32 left out: b/bad.jpg" in shown
    assert shown.count("bad.jpg") == 1
    found = np.load(out)
    assert found["paths"].tolist() == [f"{c}/{n}.jpg" for c in "abcd" for n in range(6)]
    np.testing.assert_allclose(np.linalg.norm(found["embeddings"], axis=1), 1, atol=1e-6)
    model = load_trained_backbone(run)
    pixels = decode_image((photos / "c" / "2.jpg").read_bytes(), tiny.SIDE)
    row = model.embed(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None])[0].numpy()
    np.testing.assert_allclose(found["embeddings"][14], row / np.linalg.norm(row), atol=1e-5)
    assert found["classes"].tolist() == [c for c in "abcd" for _ in range(6)]
    shards = str(Path(run).parent / "heldout")
    said(["embed", run, "--images", shards, "--out", str(out)], capsys)
    assert sorted(np.load(out)["labels"]) == sorted([*range(8)] * tiny.IMAGES)
    assert "let the name end with .npz or .parquet" in said(
        [*words[:-3], "--out", "a.csv"], capsys, 2
    )


def test_embeddings_in_a_folder(
    run: str, photos: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, out = str(Path(run).parent / "heldout"), tmp_path / "rows"
    words = ["embed", run, "--images", shards, "--out", str(out), "--workers", "1"]
    for attempt in ("made", "there already"):
        assert "96 embeddings of 32, float32" in said(words, capsys), attempt
    folder = EmbeddingsFolder.open(str(out))
    assert sorted(folder.labels) == sorted([*range(8)] * tiny.IMAGES)
    # What a set is in a file, it is in a folder.
    said([*words[:-3], f"{out}.npz"], capsys)
    np.testing.assert_allclose(
        np.load(f"{out}.npz")["embeddings"], folder.rows, rtol=1e-4, atol=1e-5
    )
    words_of = ["evaluate", "identification", run, "--all-pairs", "--images"]
    figures = []
    for source in (shards, str(out)):
        said([*words_of, source], capsys)
        saved = json.loads(Path(run, "evaluation", "identification.json").read_text())["results"]
        figures.append({name: value for name, value in saved.items() if name != "images"})
    assert figures[0] == figures[1] and "all/tar@far=1e-3" in figures[0]
    assert "was embedded with flip False" in said([*words_of, str(out), "--flip"], capsys, 2)
    assert "holds embeddings with normalize False, not True" in said(
        [*words, "--normalize"], capsys, 2
    )
    assert "--workers is for a folder" in said([*words, "--out", "a.npz"], capsys, 2)
    assert "let --out end with .npz" in said([*words, "--images", str(photos)], capsys, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "type mhe embed without torchrun" in said(words, capsys, 2)


@pytest.mark.parametrize("images", ["photos", "shards"])
def test_embeddings_as_parquet(
    run: str, photos: Path, tmp_path: Path, capsys: Captured, images: str
) -> None:
    source = str(photos if images == "photos" else Path(run).parent / "heldout")
    files = [str(tmp_path / name) for name in ("a.npz", "a.parquet")]
    for file in files:
        said(["embed", run, "--images", source, "--out", file], capsys)
    arrays, table = np.load(files[0]), pd.read_parquet(files[1])
    assert list(table.columns) == ["key", "class", "vector"]
    np.testing.assert_array_equal(np.stack(table["vector"].tolist()), arrays["embeddings"])
    assert table["key"].tolist() == arrays["paths" if images == "photos" else "keys"].tolist()
    assert len(set(table["key"])) == len(table)
    labels = [*"abcd"] if images == "photos" else [str(n) for n in range(8)]
    assert sorted(set(table["class"])) == labels
    one, other = map(read_embeddings, files)
    assert (one.keys, one.classes, one.source) == (other.keys, other.classes, other.source)
    np.testing.assert_array_equal(one.rows, other.rows)


def test_a_search(run: str, photos: Path, tmp_path: Path, capsys: Captured) -> None:
    new, out = tmp_path / "new", tmp_path / "found"
    new.mkdir()
    for name, path in (("x.jpg", "c/2.jpg"), ("y.jpg", "a/0.jpg")):
        (new / name).write_bytes((photos / path).read_bytes())
    words = ["search", run, "--query", str(new), "--out", str(out), "--top", "3", "--gallery"]
    shown = said([*words, str(photos)], capsys)
    assert "x.jpg c/2.jpg 1.000" in " ".join(shown.split())
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert len(rows) == 2 * 3
    best = [(row["query"], row["entry"], row["class"]) for row in rows if row["rank"] == "1"]
    assert best == [("x.jpg", "c/2.jpg", "c"), ("y.jpg", "a/0.jpg", "a")]
    page = (out / "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 + 6
    assert "http" not in page and "prefers-color-scheme: dark" in page
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.size[0] > 4 * 112
    # The same from a file of embeddings, whose images are found again.
    said(["embed", run, "--images", str(photos), "--out", str(tmp_path / "g.npz")], capsys)
    said([*words, str(tmp_path / "g.npz")], capsys)
    assert (out / "index.html").read_text().split("<p>")[1] == page.split("<p>")[1]
    # And in shards, whose images are looked up in the tars.
    shown = said([*words, str(Path(run).parent / "heldout")], capsys)
    assert re.search(r"x\.jpg +\S+ \(\d+\)", shown), "its class, and its key"
    assert (out / "index.html").read_text().count("data:image/jpeg;base64,") == 2 + 6


def test_a_query_does_not_find_itself(
    run: str, photos: Path, tmp_path: Path, capsys: Captured
) -> None:
    words = ["search", run, "--gallery", str(photos), "--query", str(photos)]
    shown = said([*words, "--out", str(tmp_path / "found"), "--top", "100"], capsys)
    assert "of 24 queries found their own class first" in shown
    rows = list(csv.DictReader((tmp_path / "found" / "results.csv").read_text().splitlines()))
    assert len(rows) == 24 * 23
    assert not [row for row in rows if row["query"] == row["entry"]]


def test_an_approximate_search_says_so(
    run: str, photos: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "is_worth_it", lambda *_: True)
    monkeypatch.setattr(approximate, "RECALL", 0.0)
    words = ["search", run, "--gallery", str(photos), "--query", str(photos), "--top", "2"]
    words += ["--out", str(tmp_path / "found")]
    shown = " ".join(said(words, capsys).split())
    assert "The search was approximate: it found" in shown and "measured on 24 of" in shown
    assert "approximate: it found" in (tmp_path / "found" / "index.html").read_text()
    assert "search was approximate" not in said([*words, "--exact"], capsys)
    assert "exact: every pair was compared" in (tmp_path / "found" / "index.html").read_text()


@pytest.mark.parametrize(
    ("gallery", "query", "words"),
    [
        ("nowhere.npz", "photos", "nowhere.npz: does not exist"),
        ("bad.npz", "photos", "bad.npz: not a file that mhe embed wrote"),
        ("narrow.npz", "photos", "its embeddings have 3 numbers, those of this run"),
        ("photos", "bad.npz", "name the images themselves"),
    ],
)
def test_mistakes_of_a_search(
    run: str, photos: Path, tmp_path: Path, capsys: Captured, gallery: str, query: str, words: str
) -> None:
    (tmp_path / "bad.npz").write_bytes(b"no file of NumPy")
    names = np.array(["a"])
    np.savez(
        tmp_path / "narrow.npz", embeddings=np.ones((1, 3)), paths=names, classes=names, source="x"
    )
    paths = [str(photos) if name == "photos" else str(tmp_path / name) for name in (gallery, query)]
    message = said(["search", run, "--gallery", paths[0], "--query", paths[1]], capsys, 2)
    assert words in " ".join(message.split())


def test_mistakes_are_told_before_a_model_is_loaded(
    run: str, tmp_path: Path, capsys: Captured
) -> None:
    assert "name the sets" in said(["evaluate", "verification", run], capsys, 2)
    (tmp_path / "a.bin").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    message = said(["evaluate", "verification", "nowhere", str(tmp_path / "a.bin")], capsys, 2)
    assert "asks for posix.system" in message
    assert "no run at nowhere" in said(["evaluate", "nowhere"], capsys, 2)
    assert "no such checkpoint" in said(["evaluate", f"{run}/checkpoints/step_9"], capsys, 2)


def test_the_config_of_the_run_says_where_it_is_evaluated(run: str, tmp_path: Path, capsys) -> None:
    values = yaml.safe_load(Path(run, "config.yaml").read_text())
    other = tmp_path / "gpu"
    shutil.copytree(run, other)
    (other / "config.yaml").write_text(yaml.safe_dump(values | {"scale": {"gpu": True}}))
    assert "torch sees no GPU" in said(["evaluate", str(other)], capsys, 2)
    assert said(["evaluate", str(other), "--no-gpu"], capsys)
    checkpoint = str(other / "checkpoints" / "step_00000024")
    assert "torch sees no GPU" in said(["evaluate", checkpoint], capsys, 2)
