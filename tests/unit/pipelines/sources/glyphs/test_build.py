"""The glyph data set: characters as identities, unseen ones in unseen typefaces held out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import webdataset
from fontTools import subset
from fontTools.ttLib import TTCollection, TTFont

from mhe_dist.config.data import GlyphsConfig
from mhe_dist.config.schema import Config
from mhe_dist.errors import RunError, UserError
from pipelines.shards import writer
from pipelines.shards.index import ShardIndex
from pipelines.sources.glyphs.build import (
    ensure_glyphs,
    matplotlib_fonts,
    open_typefaces,
    write_glyphs,
)
from pipelines.sources.glyphs.draw import FontFace, SurveyTask, survey_typeface, unpack_fingerprints
from pipelines.sources.glyphs.fonts import find_fonts
from pipelines.sources.glyphs.plan import Glyph, merge_lookalikes, plan_classes, split_fonts
from pipelines.sources.glyphs.typeface import GlyphPen, Typeface, UnusableFontError, open_faces
from tests.support.faults import disk_full

LATIN, GREEK = range(0x41, 0x5B), [c for c in range(0x391, 0x3AA) if c != 0x3A2]
FILES = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "STIXGeneral", "STIXGeneralBol"]
SETTINGS = GlyphsConfig(heldout_classes=6, min_fonts=3)
ALPHA, A = 0x391, 0x41


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five of matplotlib's fonts, cut down to the capitals, a blank and two look-alikes."""
    folder = tmp_path_factory.mktemp("fonts")
    for name in FILES:
        font = TTFont(Path(matplotlib_fonts()) / f"{name}.ttf")
        cutter = subset.Subsetter(subset.Options(layout_features=[], notdef_outline=True))
        cutter.populate(unicodes=[*LATIN, *GREEK, 0x20, 0xA0, 0xAD, 0xE000])
        cutter.subset(font)
        font.save(folder / f"{name}.ttf")
    return folder


@pytest.fixture(scope="module")
def made(fonts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("glyphs")
    write_glyphs(str(fonts), str(out), SETTINGS)
    return out


def names(folder: Path) -> list[str]:
    rows = [line.split("\t") for line in (folder / "classes.tsv").read_text().splitlines()[1:]]
    assert [int(row[0]) for row in rows] == list(range(len(rows)))
    return [row[2] for row in rows]


def read(folder: Path) -> list[dict]:
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    return list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))


@pytest.mark.slow
def test_plain_webdataset_reads_them(made: Path) -> None:
    for name in ("train", "heldout"):
        index = ShardIndex.load(str(made / name))
        samples = read(made / name)
        assert len(samples) == index.samples
        assert {s["cls"] for s in samples} == set(range(index.num_classes))
        assert len({s["__key__"] for s in samples}) == len(samples)
        assert {s["jpg"].size for s in samples} == {(32, 32)}
        for s in samples:
            code, font = s["json"]["codepoint"], s["json"]["font"]
            assert s["__key__"] == f"u{code:05x}-{font.removesuffix('.ttf')}"
            assert f"U+{code:04X}" in names(made / name)[s["cls"]].split()


def test_a_picture_is_ink_in_the_middle_of_nothing(made: Path) -> None:
    for s in read(made / "train"):
        picture = np.asarray(s["jpg"].convert("L"), int)
        ink = picture > 20
        assert 0.02 < ink.mean() < 0.6
        columns = np.flatnonzero(ink.any(0))
        assert abs((columns[0] + columns[-1]) / 2 - 15.5) <= 1
        assert picture[0].max() < 40
        assert picture[-1].max() < 40


def test_no_class_and_no_typeface_of_the_probes_is_trained_on(made: Path) -> None:
    train, heldout = read(made / "train"), read(made / "heldout")
    trained = {s["json"]["codepoint"] for s in train}
    assert trained.isdisjoint(s["json"]["codepoint"] for s in heldout)
    known = {s["json"]["font"] for s in train}
    assert known == {"DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf"}
    probes = {s["json"]["font"] for s in heldout if s["json"]["role"] == "probe"}
    assert probes == {"STIXGeneral.ttf", "STIXGeneralBol.ttf"}


def test_a_heldout_class_begins_with_its_enrolment_image(made: Path) -> None:
    index, samples = ShardIndex.load(str(made / "heldout")), read(made / "heldout")
    assert index.num_classes == SETTINGS.heldout_classes
    labels = [s["cls"] for s in samples]
    assert labels == sorted(labels)
    gallery = [labels.index(label) for label in range(index.num_classes)]
    assert index.meta["gallery"] == gallery
    for number, s in enumerate(samples):
        role = "gallery" if number in gallery else "probe"
        assert s["json"]["role"] == role
        assert index.meta["fonts"][index.meta["font"][number]] == s["json"]["font"]
        assert s["json"]["font"].startswith("DejaVuSans.ttf" if role == "gallery" else "STIX")
    assert len(samples) >= 3 * index.num_classes


def test_letters_that_look_alike_are_one_class_and_blanks_are_none(made: Path) -> None:
    classes = [set(line.split()) for name in ("train", "heldout") for line in names(made / name)]
    [with_a] = [c for c in classes if "U+0041" in c]
    assert "U+0391" in with_a or all("U+0391" not in c for c in classes)
    codes = set().union(*classes)
    assert codes.isdisjoint({"U+0020", "U+00A0", "U+00AD", "U+E000"})
    # 24 Greek capitals, of which 14 look like Latin ones; and the other 12 Latin ones.
    assert len(classes) == 26 + 24 - 14


def test_no_picture_is_in_two_classes_or_twice_in_one(made: Path) -> None:
    for name in ("train", "heldout"):
        pictures = [s["jpg"].tobytes() for s in read(made / name)]
        assert len(set(pictures)) == len(pictures)


def test_training_samples_are_shuffled(made: Path) -> None:
    labels = [s["cls"] for s in read(made / "train")]
    assert labels != sorted(labels)


@pytest.mark.slow
def test_the_same_settings_make_the_same_data(fonts: Path, made: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_glyphs(str(fonts), str(tmp_path), SETTINGS, lambda *counts: seen.append(counts))
    for name in ("train", "heldout"):
        one, other = (ShardIndex.load(str(path / name)) for path in (tmp_path, made))
        assert one.digest == other.digest
        assert one.meta == other.meta
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_an_existing_set_is_refused(fonts: Path, made: Path) -> None:
    with pytest.raises(UserError, match="train: already exists; delete it or choose another"):
        write_glyphs(str(fonts), str(made), SETTINGS)


@pytest.mark.slow
def test_an_interrupted_call_goes_on(
    fonts: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_glyphs(str(fonts), str(tmp_path / "out"), SETTINGS, stop)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name[0] != "."]
    monkeypatch.setattr(GlyphPen, "draw", lambda *_: pytest.fail("all was drawn already"))
    write_glyphs(str(fonts), str(tmp_path / "out"), SETTINGS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["heldout", "train"]
    for name in ("train", "heldout"):
        one, other = (ShardIndex.load(str(path / name)) for path in (tmp_path / "out", made))
        assert one.digest == other.digest


def config(shards: Path, **glyphs: object) -> Config:
    settings = {"heldout_classes": 6, "min_fonts": 3, **glyphs}
    return Config(data={"shards": str(shards), "glyphs": settings})


def test_ensure_makes_them_once(fonts: Path, tmp_path: Path) -> None:
    wanted = config(tmp_path / "a" / "train", fonts=str(fonts))
    assert ensure_glyphs(wanted.data)
    assert ShardIndex.load(str(tmp_path / "a" / "heldout")).num_classes == 6
    assert not ensure_glyphs(wanted.data)
    assert not ensure_glyphs(Config(data={"shards": "/nowhere"}).data)


def test_ensure_does_not_take_other_glyphs_for_those_of_the_config(made: Path) -> None:
    assert not ensure_glyphs(config(made / "train").data)
    with pytest.raises(UserError, match=r"data\.glyphs\.image_size=48: .* were made with 32"):
        ensure_glyphs(config(made / "train", image_size=48).data)


def test_ensure_wants_a_folder_that_leaves_room_for_the_heldout_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it must be a folder named 'train'"):
        ensure_glyphs(config(tmp_path / "glyphs").data)


def test_a_folder_without_fonts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no font file"):
        write_glyphs(str(tmp_path), str(tmp_path / "out"), SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heldout_classes": 1000}, r"heldout_classes=1000: only \d+ classes"),
        ({"min_fonts": 4}, "min_fonts=4: no character is in so many of the 3 fonts"),
        ({"heldout_fonts": ["*"]}, "keeps every font"),
        ({"heldout_fonts": ["No*"], "heldout_classes": 99}, "no font here matches"),
    ],
)
def test_settings_that_leave_nothing_are_refused(
    fonts: Path, tmp_path: Path, change: dict, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        write_glyphs(str(fonts), str(tmp_path), SETTINGS.model_copy(update=change))


def test_in_any_other_folder_the_smallest_family_is_held_out(fonts: Path) -> None:
    faces = list(open_typefaces(find_fonts(str(fonts))).values())
    settings = SETTINGS.model_copy(update={"heldout_fonts": ["None*"]})
    known, unseen = split_fonts(faces, settings)
    assert len({face.family for face in faces if face.name in unseen}) == 1
    assert sorted([*known, *unseen]) == sorted(f"{name}.ttf" for name in FILES)


OPEN_A_FONT = """
import gc, sys
from pathlib import Path
from pipelines.sources.glyphs.typeface import open_faces

collections = []
while gc.collect():
    pass
gc.disable()
gc.callbacks.append(lambda phase, info: collections.append(phase))
assert open_faces(Path(sys.argv[1]))
assert not collections, collections
assert (left := gc.collect()) == 0, left
"""


def test_a_font_leaves_nothing_to_the_garbage_collector_and_does_not_call_it() -> None:
    """A collection takes a second in a process that holds much; there are thousands of fonts.

    In a process of its own: what other tests leave is collected when it likes.
    """
    font = Path(matplotlib_fonts()) / "DejaVuSans.ttf"
    opened = subprocess.run([sys.executable, "-c", OPEN_A_FONT, str(font)], check=False)
    assert opened.returncode == 0


def test_damaged_fonts_are_left_out(fonts: Path, tmp_path: Path) -> None:
    (tmp_path / "good.ttf").write_bytes((fonts / "DejaVuSans.ttf").read_bytes())
    (tmp_path / "bad.ttf").write_bytes(b"\0\1\0\0 nothing")
    (tmp_path / "empty.otf").write_bytes(b"")
    (tmp_path / "good.ttf.bak").write_bytes(b"")
    (tmp_path / "good.ttc").write_bytes((fonts / "DejaVuSans.ttf").read_bytes())
    assert list(open_typefaces(find_fonts(str(tmp_path)))) == ["good.ttc"]
    with pytest.raises(UnusableFontError, match=r"bad\.ttf: not a usable font"):
        Typeface(tmp_path / "bad.ttf")


@pytest.mark.parametrize("side", [16, 32, 112])
def test_relative_size_and_height_are_kept(side: int) -> None:
    face = GlyphPen(Path(matplotlib_fonts()) / "DejaVuSans.ttf", side)

    def rows(character: str) -> np.ndarray:
        picture = face.draw(ord(character))
        assert picture is not None
        assert picture.shape == (side, side)
        return np.flatnonzero((picture > 100).any(1))

    assert abs(len(rows("H")) - 0.625 * side) <= 1
    assert len(rows("o")) < len(rows("O"))
    assert rows(".")[0] > rows("·")[-1] > rows("'")[0]
    assert rows("'")[-1] < rows(",")[0]


def test_what_is_larger_than_the_picture_is_shrunk() -> None:
    face = GlyphPen(Path(matplotlib_fonts()) / "DejaVuSans.ttf", 32)
    picture = face.draw(ord("‱"))
    assert picture is not None
    ink = np.flatnonzero((picture > 20).any(0))
    assert 0 < ink[0] <= 3
    assert 28 <= ink[-1] < 31


def test_fonts_are_found_below_and_told_apart(fonts: Path, tmp_path: Path) -> None:
    for path, source in (
        ("a/x.ttf", "DejaVuSans"),
        ("b/x.ttf", "DejaVuSerif"),
        ("b/x.OTF", "STIXGeneral"),
        ("c/same.ttf", "DejaVuSans"),
        ("c/x.ttf", "DejaVuSans-Bold"),
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((fonts / f"{source}.ttf").read_bytes())
    (tmp_path / "README").write_text("no font")
    found = find_fonts(str(tmp_path))
    assert [font.name for font in found] == ["b-x.ttf", "c-x.ttf", "same.ttf", "x.OTF"]


@pytest.fixture(scope="module")
def collection(fonts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of two faces with the same outlines; the second one swaps A and B."""
    folder = tmp_path_factory.mktemp("collection")
    faces = []
    for swapped in (False, True):
        font = TTFont(fonts / "DejaVuSans.ttf")
        for cmap in {id(table.cmap): table.cmap for table in font["cmap"].tables}.values():
            if swapped:
                cmap[0x41], cmap[0x42] = cmap[0x42], cmap[0x41]
        faces.append(font)
    both = TTCollection()
    both.fonts = faces
    both.save(folder / "Both.ttc", shareTables=True)
    return folder


def test_a_face_of_a_collection_draws_only_what_is_its_own(collection: Path) -> None:
    first, second = open_faces(collection / "Both.ttc")
    assert (first.name, second.name) == ("Both.ttc", "Both.ttc#1")
    assert set(LATIN) <= set(first.codes)
    assert second.codes == [0x41, 0x42]
    pens = [GlyphPen(collection / "Both.ttc", 32, face) for face in (0, 1)]
    assert (pens[1].draw(0x41) == pens[0].draw(0x42)).all()
    assert Glyph(0x41, second.name).key == "u00041-Both-face1"


def test_the_faces_of_a_file_stay_together_and_count_once() -> None:
    fonts = [SimpleFont(name, "F", [1, 2]) for name in ("a.ttc", "a.ttc#1", "b.ttf")]
    settings = GlyphsConfig(heldout_fonts=["a.ttc"], heldout_classes=1, min_fonts=2)
    known, unseen = split_fonts(fonts, settings)
    assert (known, unseen) == (["b.ttf"], ["a.ttc", "a.ttc#1"])
    pictures = {Glyph(65, "a.ttc"): b"1", Glyph(65, "a.ttc#1"): b"2", Glyph(66, "b.ttf"): b"3"}
    pictures |= {Glyph(66, "c.ttf"): b"4", Glyph(67, "b.ttf"): b"5", Glyph(67, "u.ttf"): b"6"}
    plan = plan_classes(pictures, ["a.ttc", "a.ttc#1", "b.ttf", "c.ttf"], ["u.ttf"], settings)
    assert [[glyph.code for glyph in group] for group in plan.train] == [[66, 66]]


class SimpleFont(NamedTuple):
    name: str
    family: str
    codes: list[int]


@pytest.mark.parametrize("data", [b"ttcf", b"ttcf\0\1\0\0\xff\xff\xff\xff" + bytes(99), b"OTTO"])
def test_a_damaged_collection_is_left_out(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.ttc").write_bytes(data)
    with pytest.raises(UnusableFontError, match=r"bad\.ttc: not a usable font"):
        open_faces(tmp_path / "bad.ttc")


def test_classes_are_drawn_at_random_and_nested() -> None:
    pictures = {Glyph(65 + n, font): f"{n}{font}".encode() for n in range(20) for font in "123"}
    pictures |= {Glyph(99, "1"): b"a", Glyph(99, "9"): b"b"}

    def chosen(limit: int) -> list[int]:
        settings = GlyphsConfig(heldout_classes=1, min_fonts=3, max_classes=limit)
        return [g[0].code for g in plan_classes(pictures, ["1", "2", "3"], ["9"], settings).train]

    assert chosen(0) == list(range(65, 85))
    assert chosen(99) == chosen(0)
    assert len(chosen(5)) == 5
    assert chosen(5) == sorted(chosen(5))
    assert set(chosen(5)) < set(chosen(10)) < set(chosen(0))


def test_placeholders_are_no_pictures(fonts: Path) -> None:
    face = FontFace(str(fonts / "DejaVuSans.ttf"), 32, 0, 0.0)
    found = dict(
        unpack_fingerprints(survey_typeface(SurveyTask(face, [0x41, 0x42, *[0x43] * 3, 0x20])))
    )
    assert sorted(found) == [0x41, 0x42, 0x43]


def glyphs(*names: str) -> dict[Glyph, bytes]:
    """`"A1x"`: character A in font 1 looks like x."""
    return {Glyph(ord(name[0]), name[1]): name[2:].encode() for name in names}


def test_merging_is_transitive_and_over_all_fonts() -> None:
    # A and B share a picture in font 1, B and C in font 2; D is like A, but in another font.
    merged = merge_lookalikes(glyphs("A1x", "B1x", "B2y", "C2y", "C3z", "D9x", "E1e", "E2f"))
    assert [sorted({chr(g.code) for g in group}) for group in merged] == [list("ABCD"), ["E"]]


def test_a_plan_counts_typefaces_and_drops_repeated_pictures() -> None:
    pictures = glyphs("A1x", "A2x", "B1x", "A3a", "C1c", "C2d", "D1e", "D2f", "D3g", "E1e2", "E9e3")
    settings = GlyphsConfig(heldout_classes=1, min_fonts=3)
    plan = plan_classes(pictures, ["1", "2", "3"], ["9"], settings)
    assert [[f"{chr(g.code)}{g.font}" for g in group] for group in plan.train] == [
        ["A1", "A3"],
        ["D1", "D2", "D3"],
    ]
    assert [[f"{chr(g.code)}{g.font}" for g in group] for group in plan.heldout] == [["E1", "E9"]]


@pytest.mark.slow
def test_matplotlib_s_fonts_are_a_data_set_worth_training_on() -> None:
    """Of every fifth character: a fifth of what the quickstart trains on."""
    settings = GlyphsConfig(image_size=16, heldout_classes=100)  # at 32 fewer look alike
    files = {file.name: file.path for file in find_fonts(matplotlib_fonts())}
    faces = open_typefaces(find_fonts(matplotlib_fonts()))
    known, unseen = split_fonts(list(faces.values()), settings)
    surveys = {
        name: survey_typeface(
            SurveyTask(
                FontFace(files[name], 16, 0, faces[name].capital),
                [code for code in faces[name].codes if not code % 5],
            )
        )
        for name in (*known, *unseen)
    }
    pictures = {
        Glyph(code, name): fingerprint
        for name, result in surveys.items()
        for code, fingerprint in unpack_fingerprints(result)
    }
    plan = plan_classes(pictures, known, unseen, settings)
    assert known[0] == "DejaVuSans.ttf"
    assert all(name.startswith("DejaVu") for name in known)
    assert len(unseen) == 4
    assert all(name.startswith("STIXGeneral") for name in unseen)
    assert len(plan.train) >= 600
    assert sum(len(group) for group in plan.train) >= 5_000
    assert len(plan.heldout) == 100


def test_the_index_is_small(made: Path) -> None:
    assert len(json.dumps(ShardIndex.load(str(made / "train")).meta)) < 2000


def test_a_full_disk_says_what_is_missing(
    fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_tar", disk_full)
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        with pytest.raises(RunError) as failed:
            write_glyphs(str(fonts), str(tmp_path / "out"), SETTINGS)
    said = str(failed.value)
    assert said.startswith(f"{tmp_path}/out/heldout: the disk is full. About 1 MiB are still")
    assert "the same command goes on" in said and "1 MiB are missing" in said
    write_glyphs(str(fonts), str(tmp_path / "out"), SETTINGS)
    assert ShardIndex.load(str(tmp_path / "out" / "train")).samples


def test_the_training_classes_in_the_typefaces_that_are_held_out(
    fonts: Path, made: Path, tmp_path: Path
) -> None:
    write_glyphs(str(fonts), str(tmp_path), SETTINGS.model_copy(update={"known_classes": True}))
    assert not (made / "known").exists()
    train, known = (ShardIndex.load(str(tmp_path / name)) for name in ("train", "known"))
    assert names(tmp_path / "known") == names(tmp_path / "train") == names(made / "train")
    assert known.num_classes == train.num_classes
    of_class = {(int(s["cls"]), s["json"]["codepoint"]) for s in read(tmp_path / "train")}
    heldout = {s["json"]["codepoint"] for s in read(tmp_path / "heldout")}
    images = read(tmp_path / "known")
    assert len(images) == known.samples > known.num_classes
    for s in images:
        code = s["json"]["codepoint"]
        assert code not in heldout
        assert (int(s["cls"]), code) in of_class or code in GREEK  # one class with a Latin letter
        assert s["json"]["role"] == "probe" and s["json"]["font"].startswith("STIX")
