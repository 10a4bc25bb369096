"""How one layer of a configuration lies on another: kinds, items of lists, ranges, `${...}`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mhe_dist.config.describe import value_at
from mhe_dist.config.load import ConfigLike, load_config, resolve_config
from mhe_dist.config.schema import Config
from tests.support.config_sections import mistakes_of

BASE = {"data": {"shards": "x"}, "head": {"kind": "mhs", "mhs": {"length": 7}}}
MIX = """\
data:
  shards: x
  mix:
    - shards: y
    - shards: z
      weight: 0.5
"""


@pytest.fixture
def mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("mix.yaml").write_text(MIX)
    return "mix.yaml"


def mistakes(base: ConfigLike, *overrides: str, **sections: Any) -> list[str]:
    return mistakes_of(resolve_config, base, overrides, **sections)


@pytest.mark.parametrize("base", [BASE, load_config(BASE)], ids=["dict", "Config"])
def test_a_kind_changed_in_python_leaves_the_keys_of_the_former_kind_out(
    base: ConfigLike,
) -> None:
    assert resolve_config(base, ["head.kind=full"]).head.kind == "full"
    assert resolve_config(base, head={"kind": "full"}).head.kind == "full"
    assert resolve_config(base, optim={"kind": "adamw", "betas": (0.5, 0.6)}).optim.betas[0] == 0.5
    assert resolve_config(base, ["head.margin.kind=softmax"]).head.mhs.length == 7


def test_a_change_of_python_that_contradicts_itself_is_refused() -> None:
    words = "belongs to optim.kind=sgd, but optim.kind is adamw; leave it out, or set"
    wrong = {"kind": "adamw", "momentum": 0.5}
    for found in (mistakes(BASE, optim=wrong), mistakes({**BASE, "optim": wrong})):
        assert found == [f"optim.momentum=0.5: {words} optim.kind=sgd"]


def test_python_gives_paths_and_dotted_names() -> None:
    config = resolve_config({"data.shards": Path("here")}, **{"run.dir": "there"})
    assert (config.data.shards, config.run.dir) == ("here", "there")


@pytest.mark.parametrize("path", ["data.mix.1.weight", "data.mix[1].weight"])
def test_an_item_of_a_list_is_changed_alone(mix: str, path: str) -> None:
    first, second = load_config(mix, [f"{path}=2", "data.mix[0].shards=007"]).data.mix
    assert (first.shards, first.weight) == ("007", 1)
    assert (second.shards, second.weight) == ("z", 2)


def test_items_of_a_list_by_default_are_changed_too() -> None:
    config = load_config(BASE, ["export.formats[1]=mlflow"])
    assert config.export.formats == ["timm", "mlflow"]
    assert load_config(BASE).export.formats == ["timm", "onnx"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.mix[2].weight=3", "data.mix has 2 items, numbered from 0; to have others, give the "
         "whole list: data.mix=[...]"),
        ("data.mix[-1].weight=3", "data.mix has 2 items, numbered from 0; to have others, give "
         "the whole list: data.mix=[...]"),
        ("evaluate.verification[0]=a.bin", "evaluate.verification has no items; to have others, "
         "give the whole list: evaluate.verification=[...]"),
        ("data.mix[1].weight=-3", "must be a number greater than 0 and at most 1000"),
        ("data.mix[0].wieght=3", "there is no such key; did you mean data.mix[0].weight?"),
        ("data.mix[0].colour=3", "there is no such key; data.mix[0] has shards, labels, weight, "
         "classes"),
    ],
)  # fmt: skip
def test_a_mistake_in_an_item_names_it(mix: str, override: str, says: str) -> None:
    assert mistakes(mix, override) == [f"{override} (command line): {says}"]
    dotted = override.replace("[", ".").replace("]", "")
    assert mistakes(mix, dotted) == [f"{override} (command line): {says}"]


def test_a_mistake_in_an_item_of_the_file_has_its_line(mix: str) -> None:
    Path(mix).write_text(MIX.replace("0.5", "-1") + "    - weight: 1\n    - 7\n")
    assert mistakes(mix) == [
        "data.mix[1].weight=-1 (mix.yaml:6): must be a number greater than 0 and at most 1000",
        "data.mix[2].shards (mix.yaml:7): is required: Folder or URL that holds index.json and "
        "the tars.",
        "data.mix[3]=7 (mix.yaml:8): must be a list, each item a block of keys (shards, labels, "
        "weight, classes)",
    ]


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        ("{workers: {min: 1, max: 4}}", ["scale.workers={min: 2, max: 4}"], (2, 4)),
        ("{workers: {min: 1, max: 4}}", ["scale.min_workers=2"], (2, 4)),
        ("{workers: {min: 1, max: 4}}", ["scale.workers=2"], (0, 2)),
        ("{workers: {min: 1, max: 4}}", ["scale.workers.max=2"], (1, 2)),
        ("{workers: 4, min_workers: 2}", ["scale.workers={min: 1, max: 4}"], (1, 4)),
        ("{workers: 4, min_workers: 2}", ["scale.workers.min=1"], (1, 4)),
        ("{workers: 4, min_workers: 2}", ["scale.min_workers=1"], (1, 4)),
        ("{min_workers: 2}", ["scale.workers={min: 1, max: 4}", "scale.min_workers=2"], (2, 4)),
        ("{}", ["scale.min_workers=2", "scale.workers={min: 1, max: 4}"], (1, 4)),
    ],
)
def test_of_a_range_of_workers_the_later_word_counts(
    tmp_path: Path, below: str, above: list[str], expected: tuple[int, int]
) -> None:
    (tmp_path / "run.yaml").write_text(f"data: {{shards: x}}\nscale: {below}\n")
    scale = load_config(str(tmp_path / "run.yaml"), above).scale
    assert (scale.min_workers, scale.workers) == expected


def test_a_range_of_workers_lies_on_a_config_as_a_whole() -> None:
    base = load_config(BASE, ["scale.workers={min: 2, max: 4}"])
    scale = resolve_config(base, scale={"workers": {"min": 1, "max": 2}}).scale
    assert (scale.min_workers, scale.workers) == (1, 2)
    scale = resolve_config(base, scale={"min_workers": 1}).scale
    assert (scale.min_workers, scale.workers) == (1, 4)


@pytest.mark.parametrize(
    "workers", ["{min: 1}", "{min: 1.5, max: 4}", "{min: on, max: 4}", "{min: 0, max: 4}"]
)
def test_what_is_no_range_of_workers_is_one_mistake(workers: str) -> None:
    assert mistakes(BASE, f"scale.workers={workers}") == [
        "scale.workers (command line): must be a whole number greater than 0, or "
        "{min: a, max: b} with two such numbers"
    ]


def test_the_fewest_workers_are_said_once() -> None:
    (line,) = mistakes({**BASE, "scale": {"workers": {"min": 1, "max": 4}, "min_workers": 2}})
    assert line == (
        "scale: workers={min: 1, max: 4} says the fewest workers, too: leave min_workers=2 out"
    )


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("${nope}", "Interpolation key 'nope' not found; ${...} takes a key that the file or an "
         "override sets; an environment variable is $NAME in a path, ${oc.env:NAME} elsewhere"),
        ("${nope:3}", "Unsupported interpolation type nope"),
        ("${oc.env:NO_SUCH}", "KeyError raised while resolving interpolation: \"Environment "
         "variable 'NO_SUCH' not found\""),
        ("${run.name", "is no valid ${...}: no viable alternative at input '${run.name'"),
        ("???", "Missing mandatory value: "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["run.dir", "optim.lr", "data.mix.0.shards"])
def test_what_cannot_be_filled_in_is_a_mistake_with_key_and_place(
    mix: str, key: str, value: str, says: str
) -> None:
    shown = key.replace(".0", "[0]")
    if value == "???":
        says += key.rpartition(".")[2]
    assert mistakes(mix, f"{key}={value}") == [f"{shown}={value} (command line): {says}"]


def test_what_the_file_cannot_fill_in_has_its_line(mix: str) -> None:
    for value, says in (("${nope}", "=${nope} (mix.yaml:8): Interpolation key 'nope' not found"),
                        ("${nope", " (mix.yaml:8): is no valid ${...}: no viable")):  # fmt: skip
        Path(mix).write_text(f"{MIX}run:\n  dir: '{value}'\n")
        assert mistakes(mix)[0].startswith(f"run.dir{says}")


def test_what_is_no_value_of_a_configuration_is_a_mistake(mix: str) -> None:
    Path(mix).write_text(f"{MIX}model:\n  kwargs:\n    a: !!set {{1, 2}}\n")
    assert mistakes(mix) == [
        "model.kwargs.a (mix.yaml:9): Value 'set' is not a supported primitive type"
    ]
    assert mistakes({**BASE, "model": {"kwargs": {"a": {1}}}}) == [
        "model.kwargs.a={1}: Value 'set' is not a supported primitive type"
    ]


NUMBERS = {
    "optim.lr": "on",
    "optim.clip_norm": "yes",
    "train.max_steps": "off",
    "head.mhs.length": "on",
    "head.margin.m": "off",
    "head.groups": "on",
    "scale.zero_stage": "on",
    "scale.workers": "on",
    "model.mean": "[on, 0, 0]",
    "scale.resources": "{memory: on}",
    "data.mix[1].weight": "on",
    "optim.betas": "[0.9, off]",
    "head.mhp.lengths": "[2, on]",
}


@pytest.mark.parametrize("key", NUMBERS)
def test_a_truth_value_is_no_number(mix: str, key: str) -> None:
    kinds = {"optim.betas": ["optim.kind=adamw"], "head.mhp.lengths": ["head.kind=mhp"]}
    (line,) = mistakes(mix, *kinds.get(key, []), f"{key}={NUMBERS[key]}")
    assert line.startswith(key)
    assert line.endswith(
        "but YAML reads this (on, yes, off, no) as a truth value: write the number"
    )


def test_truth_values_are_taken_where_they_belong() -> None:
    config: Config = load_config(BASE, ["tracking.mlflow=off", "model.kwargs={a: on, b: [no]}"])
    assert value_at(config, "tracking.mlflow") is False
    assert config.model.kwargs == {"a": True, "b": [False]}
