"""What `mhe train` refuses before it starts anything."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.preflight.checks import check_data, check_names, check_selection
from launcher.preflight.node_probe import probe_node
from mhe_dist.config.load import load_config
from mhe_dist.config.mistakes import ConfigErrors
from mhe_dist.config.schema import Config
from mhe_dist.errors import UserError
from tests.support import tiny
from tests.support.config_sections import config
from tests.support.waiting import WATCHDOG_S


def wrong_keys(shards: str, heldout: str, glyphs: bool) -> list[str]:
    data = {"shards": shards, "glyphs": {} if glyphs else None}
    return [key for key, _ in check_data(config(data=data, evaluate={"shards": heldout}))]


def make_shards(folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "index.json").write_text("{}")
    return str(folder)


def test_shards_must_exist(tmp_path: Path) -> None:
    there = make_shards(tmp_path / "a")
    assert wrong_keys(there, "", False) == []
    assert wrong_keys(there, there, False) == []
    assert wrong_keys(str(tmp_path / "b"), str(tmp_path / "c"), False) == [
        "data.shards",
        "evaluate.shards",
    ]


def test_a_folder_that_is_not_there_is_told_from_one_without_an_index(tmp_path: Path) -> None:
    settings = config(data={"shards": str(tmp_path / "b")}, evaluate={"shards": str(tmp_path)})
    missing, empty = (problem for _, problem in check_data(settings))
    assert missing.startswith("there is no such folder; give a folder of indexed shards")
    assert empty.startswith("there is no index.json in it; give a folder of indexed")


def test_a_probe_names_the_path_beside_the_key(tmp_path: Path) -> None:
    """Of a run with three data sets it was not said which folder is missing."""
    data = {"shards": make_shards(tmp_path / "a"), "mix": [{"shards": "nowhere"}]}
    found = probe_node(config(data=data, run={"name": "a", "dir": str(tmp_path)}))
    assert [key for key, _ in found["problems"]] == ["data.mix[0].shards=nowhere"]


@pytest.mark.parametrize("root", ["", "out/", "/out/", "s3-like/"])
def test_glyphs_make_train_and_heldout_side_by_side(root: str) -> None:
    assert wrong_keys(f"{root}train", f"{root}heldout", True) == []
    assert wrong_keys(f"{root}train/", f"{root}heldout/", True) == []
    assert wrong_keys(f"{root}train", f"{root}elsewhere", True) == ["evaluate.shards"]


def test_glyphs_make_the_known_classes_if_they_are_asked_for() -> None:
    """The cure named the folder of the held-out classes."""
    evaluate = {"classification": "out/known"}
    known = {"shards": "out/train", "glyphs": {"known_classes": True}}
    assert not list(check_data(config(data=known, evaluate=evaluate)))
    plain = {"shards": "out/train", "glyphs": {}}
    ((key, problem),) = check_data(config(data=plain, evaluate=evaluate))
    assert key == "evaluate.classification"
    assert "one named 'known' beside data.shards with data.glyphs.known_classes=true" in problem


def test_glyphs_do_not_excuse_a_folder_that_they_never_write() -> None:
    """And what follows from that mistake is not told as another."""
    assert wrong_keys("/nowhere", "data/glyphs/heldout", True) == ["data.shards"]


def test_label_sets_must_exist(tmp_path: Path) -> None:
    there = make_shards(tmp_path / "a")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "labels.json").write_text("{}")
    mix = [{"shards": there, "labels": there}, {"shards": there, "labels": "nosuch://x"}]
    data = {"shards": there, "labels": str(tmp_path / "labels"), "mix": mix}
    found = dict(check_data(config(data=data)))
    assert list(found) == ["data.mix.0.labels", "data.mix.1.labels"]
    assert "no labels.json in it; give a folder" in found["data.mix.0.labels"]
    assert "cannot be read" in found["data.mix.1.labels"]


def test_each_set_of_a_mix_must_exist_and_is_named_with_its_line(tmp_path: Path) -> None:
    there = make_shards(tmp_path / "a")
    file = tmp_path / "run.yaml"
    sets = f"    - shards: {there}\n    - shards: {tmp_path}/b\n      labels: {tmp_path}/c\n"
    file.write_text(f"data:\n  shards: {there}\n  mix:\n{sets}")
    with pytest.raises(ConfigErrors) as caught:
        load_config(str(file), [], [check_data])
    shards, labels = (line.strip() for line in str(caught.value).splitlines()[1:])
    assert shards.startswith(f"data.mix[1].shards={tmp_path}/b ({file}:5): ")
    assert "; give a folder of indexed shards, which `mhe data` makes" in shards
    assert labels.startswith(f"data.mix[1].labels={tmp_path}/c ({file}:6): ")


def test_a_url_that_nothing_can_read_is_a_mistake() -> None:
    ((key, message),) = check_data(config(data={"shards": "nosuch://bucket/train"}))
    assert key == "data.shards"
    assert "cannot be read" in message


@pytest.mark.parametrize(
    ("files", "cure"),
    [
        (["a/1.jpg", "b/2.PNG"], "mhe data folder --root {root} --out {out}, then {key}={out}"),
        (["train.rec", "train.idx"], "mhe data recordio --rec {rec} --out {out}, then {key}={out}"),
        (["000.tar"], "mhe data index {root}"),
        (["1.jpg"], "mhe data folder --root {root} --out {out} --table FILE.csv"),
        (["notes.txt", "a/b/1.jpg"], "give a folder of indexed shards"),
    ],
)
@pytest.mark.parametrize("key", ["data.shards", "evaluate.shards"])
def test_what_is_no_data_set_yet_names_the_command_that_makes_one(
    tmp_path: Path, files: list[str], cure: str, key: str
) -> None:
    root = tmp_path / "my photos"
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    shards = {"data.shards": make_shards(tmp_path / "a"), "evaluate.shards": ""} | {key: str(root)}
    sections = {each.partition(".")[0]: {"shards": path} for each, path in shards.items()}
    ((wrong, message),) = check_data(config(**sections))
    assert wrong == key
    words = {"root": root, "out": f"{root}-shards", "rec": root / "train.rec"}
    quoted = {name: shlex.quote(str(path)) for name, path in words.items()}
    assert cure.format(key=key, **quoted) in message


def test_a_folder_around_data_sets_is_told_from_them(tmp_path: Path) -> None:
    inner = make_shards(tmp_path / "both" / "train")
    ((_, message),) = check_data(config(data={"shards": str(tmp_path / "both")}))
    assert message.endswith(f"give one of the folders in it that are data sets: {inner}")


def test_the_message_names_the_cure() -> None:
    ((_, message),) = check_data(config(data={"shards": "/nowhere"}))
    assert "there is no such folder" in message
    assert "data.glyphs" in message


def test_the_best_checkpoint_is_that_of_a_figure_that_there_is() -> None:
    def mistakes(best: str, **evaluate: Any) -> list[tuple[str, str]]:
        settings = {"every_steps": 5, "shards": "data/heldout", **evaluate}
        return list(check_names(config(checkpoint={"keep_best": best}, evaluate=settings)))

    ((key, problem),) = mistakes("-rank1_")
    assert key == "checkpoint.keep_best"
    assert problem.startswith("no evaluation gives it; did you mean rank1? There are rank1, ")
    assert mistakes("lfw/accuracy") and mistakes("classification/top1") and mistakes("hard/rank1")
    sets = {"verification": ["faces/lfw.bin"], "classification": "x", "typefaces": {"hard": "a*"}}
    for best in ("lfw/accuracy", "classification/top1", "hard/rank1", "-accuracy_std", ""):
        assert mistakes(best, **sets) == []


def test_a_neck_behind_the_batchnorm_of_an_iresnet_is_refused_before_anything_starts() -> None:
    def mistakes(**model: str) -> list[tuple[str, str]]:
        return list(check_names(config(model=model)))

    ((key, problem),) = mistakes(name="iresnet50")  # the default is a neck
    assert (key, problem) == ("model.neck", "iresnet50 ends with a BatchNorm of its own; give none")
    assert mistakes(name="iresnet50", neck="none") == mistakes(name="resnet50") == []
    ((key, problem),) = mistakes(name="iresnet51", neck="none")
    assert key == "model.name" and "or iresnet50 or" in problem


def test_names_of_our_backbones_are_known_without_importing_torch() -> None:
    code = (
        "import sys; from launcher.preflight.checks import check_names; "
        "from mhe_dist.config.schema import Config; "
        "model = {'name': 'iresnet50', 'neck': 'none'}; "
        "config = Config.model_validate({'data': {'shards': 'x'}, 'model': model}); "
        "assert list(check_names(config)) == []; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=WATCHDOG_S)


@pytest.mark.parametrize("kind", ["mhp", "mhc"])
def test_lengths_that_hold_too_few_classes_are_refused_before_anything_starts(
    kind: str, tmp_path: Path
) -> None:
    def chosen(lengths: list[int]) -> Config:
        head = {"kind": kind, kind: {"lengths": lengths}}
        return config(data={"shards": shards}, head=head)

    shards = tiny.write_shards(tmp_path, classes=5)
    message = rf"head\.{kind}\.lengths=\[2, 2\]: the product 4 .* 5 classes of data\.shards"
    with pytest.raises(UserError, match=message):
        check_selection(chosen([2, 2]))
    check_selection(chosen([3, 2]))
    check_selection(chosen([]))
