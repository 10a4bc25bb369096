"""Reading configurations, and the words for every mistake in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mhe_dist.config.describe import describe_config, value_at
from mhe_dist.config.load import load_config
from mhe_dist.config.mistakes import RENAMED, ConfigErrors
from mhe_dist.config.schema import Config
from mhe_dist.config.stored import stored_config
from mhe_dist.config.write import config_to_dict, save_config
from mhe_dist.errors import UserError
from tests.support.config_sections import mistakes_of

FILE = """\
run:
  name: first
data:
  shards: /data/train
optim:
  lr: 2e-1
train:
  global_batch: 256
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(FILE)
    return "run.yaml"


def mistakes(
    path: str | None, *overrides: str, base: tuple[str, ...] = ("data.shards=x",)
) -> list[str]:
    return mistakes_of(load_config, path, [*(base if path is None else ()), *overrides])


def test_defaults_then_file_then_command_line(file: str) -> None:
    config = load_config(file, ["train.global_batch=1024", "head.mhs.length=64"])
    assert config.model.name == "resnet18"
    assert config.optim.lr == 0.2
    assert config.train.global_batch == 1024
    assert config.head.mhs.length == 64
    assert config.run.path == "runs/first"


def test_the_last_override_wins() -> None:
    assert load_config(None, ["data.shards=x", "optim.lr=1", "optim.lr=3"]).optim.lr == 3


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("model.kwargs", {"a": 1, "b": [2]}),
        ("scale.resources", {"memory": 1e9, "mine": 2.0}),
        ("evaluate.typefaces", {"serif": "Serif", "mono": "Mono"}),
    ],
)
def test_an_empty_dict_removes_the_names_of_the_file_and_another_adds_to_them(
    key: str, names: dict[str, Any]
) -> None:
    section, name = key.split(".")
    file = {"data": {"shards": "x"}, section: {name: names}}
    (first, value), *_ = names.items()
    assert value_at(load_config(file, [f"{key}={{}}"]), key) == {}
    assert value_at(load_config(file, (), (), {section: {name: {}}}), key) == {}
    added = [f"{key}={{}}", f"{key}.{first}={value}"]
    assert value_at(load_config(file, added), key) == {first: value}
    assert value_at(load_config(file, [f"{key}={{new: {value}}}"]), key) == names | {"new": value}
    assert value_at(load_config(file, [f"{section}={{}}"]), key) == names  # a section stays


@pytest.mark.parametrize(
    "override, value",
    [
        ("optim.lr=1e-3", 1e-3),
        ("train.max_steps=1e3", 1000),
        ("head.mhp.lengths=[10, 20]", [10, 20]),
        ("head.optim.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("model.kwargs={img_size: 112}", {"img_size": 112}),
        ("model.kwargs.drop_rate=0.1", {"drop_rate": 0.1}),
        ("run.name=007", "007"),
        ("run.name='1e3'", "1e3"),
        ("evaluate.shards=", ""),
        ("evaluate.shards=s3://b/a=1,c: d", "s3://b/a=1,c: d"),
        ("evaluate.shards=${data.shards}/held", "x/held"),
        ("data.glyphs=null", None),
        ("tracking.mlflow=false", False),
    ],
)
def test_values_are_yaml_and_text_is_text(override: str, value: object) -> None:
    kinds = ["head.kind=mhp", "head.optim.kind=adamw"]
    config: object = load_config(None, ["data.shards=x", *kinds, override])
    for name in override.partition("=")[0].replace(".drop_rate", "").split("."):
        config = getattr(config, name)
    assert config == value


def test_the_three_mistakes_of_the_manual_together(file: str) -> None:
    def exists(config: Config) -> list[tuple[str, str]]:
        return [("data.shards", "there is no such folder")] if "/no" in config.data.shards else []

    with pytest.raises(ConfigErrors) as caught:
        load_config(file, ["hed.kind=mhs", "optim.lr=-1", "data.shards=/nowhere"], [exists])
    assert str(caught.value) == (
        "3 mistakes in the configuration:\n"
        "  optim.lr=-1 (command line): must be a number greater than 0\n"
        "  hed.kind=mhs (command line): there is no such key; did you mean head.kind?\n"
        "  data.shards=/nowhere (command line): there is no such folder"
    )
    assert isinstance(caught.value, UserError)
    first = caught.value.mistakes[0]
    assert (first.path, first.value, first.source) == ("optim.lr", -1, "command line")


@pytest.mark.parametrize(
    "override, words",
    [
        ("optim.lr=fast", "must be a number greater than 0"),
        ("optim.lr=.inf", "must be a number greater than 0"),
        ("optim.momentum=1", "must be a number at least 0 and less than 1"),
        ("optim.momentum=.nan", "must be a number at least 0 and less than 1"),
        ("train.micro_batch=1.5", "must be a whole number greater than 0"),
        ("data.augment.fill=300", "must be a whole number at least 0 and at most 255"),
        ("data.on_bad_sample=drop", "must be one of skip, fail"),
        ("scale.zero_stage=4", "must be one of 0, 1, 2, 3"),
        ("tracking.mlflow=2", "must be true or false"),
        ("run.dir=", "must be text that is not empty"),
        ("run.name=null", "must be text of the form ^[A-Za-z0-9][A-Za-z0-9._-]*$"),
        ("head.mhp.lengths=7", "must be a list, each item a whole number greater than 0"),
        ("optim.betas=[1, 2, 3]", "must be a list of 2, each a number at least 0 and less than 1"),
        (
            "export.formats=[tf]",
            "must be a list, each item one of timm, onnx, torch-export, mlflow, hub-folder",
        ),
        ("model.kwargs=3", "must be a block of keys"),
        ("checkpoint=often", "must be a block of keys (every_steps, every_minutes, keep_last, "
         "keep_every, keep_best)"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_what_is_right(override: str, words: str) -> None:
    kinds = ["head.kind=mhp", "optim.kind=adamw"] if override.endswith("]") else ["head.kind=mhp"]
    (line,) = mistakes(None, *kinds, override)
    assert line.endswith(f"(command line): {words}")
    assert line.startswith(override.partition("=")[0])


def test_the_item_of_a_list_is_named() -> None:
    assert mistakes(None, "head.kind=mhp", "head.mhp.lengths=[1, -2]") == [
        "head.mhp.lengths[1]=-2 (command line): "
        "must be a list, each item a whole number greater than 0"
    ]


@pytest.mark.parametrize(
    "key",
    ["run.seed", "train.max_steps", "head.groups", "head.mhs.extra_heads", "scale.max_failures"],
)
def test_a_number_that_64_bits_do_not_hold_is_refused(key: str) -> None:
    says = "(command line): must be a number of at most 63 bits"
    assert mistakes(None, f"{key}={10**20}") == [f"{key}={10**20} {says}"]
    assert mistakes(None, "head.kind=mhp", f"head.mhp.lengths=[9, {2**63}]")[0].endswith(says)


@pytest.mark.parametrize(
    "key, hint",
    [
        ("hed.kind", "did you mean head.kind?"),
        ("head.margn.scal", "did you mean head.margin.scale?"),
        ("optim.learning_rate", "optim has kind, lr, momentum, betas, weight_decay, decay_vectors, "
         "schedule, warmup_steps, final_lr, power, clip_norm, ema"),
        ("lr", "did you mean optim.lr?"),
        ("momentum", "did you mean head.optim.momentum or optim.momentum?"),
        ("scale.global_batch", "did you mean train.global_batch?"),
        ("xyzzy", "the configuration has run, data, model, head, optim, train, scale, evaluate, "
         "checkpoint, guard, tracking, export, resume"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_told_with_the_likely_one(key: str, hint: str) -> None:
    assert mistakes(None, f"{key}=1") == [f"{key}=1 (command line): there is no such key; {hint}"]


def test_an_unknown_block_is_one_mistake_with_its_line(file: str) -> None:
    Path(file).write_text("data: {shards: x}\n\nhed:\n  kind: mhs\n  mhs: {}\n3: 4\n")
    assert mistakes(file) == [
        "hed (run.yaml:3): there is no such key; did you mean head?",
        "3=4 (run.yaml:6): there is no such key; the configuration has run, data, model, head, "
        "optim, train, scale, evaluate, checkpoint, guard, tracking, export, resume",
    ]


def test_mistakes_of_the_file_have_its_line(file: str) -> None:
    Path(file).write_text(FILE.replace("2e-1", "-2").replace("global_batch", "global_bach"))
    assert mistakes(file) == [
        "optim.lr=-2 (run.yaml:6): must be a number greater than 0",
        "train.global_bach=256 (run.yaml:8): there is no such key; "
        "did you mean train.global_batch?",
    ]
    assert mistakes(file, "train.global_bach=1")[1].startswith("train.global_bach=1 (command line)")


def test_what_is_required_is_explained() -> None:
    words = "data.shards: is required: Folder or URL that holds index.json and the tars."
    assert mistakes(None, base=()) == [words]
    assert mistakes(None, "optim.lr=-1", base=())[0] == words


def test_contradictions_are_reported_although_other_keys_are_wrong() -> None:
    assert mistakes(
        None, "train.global_batch=192", "data.streams=64", "scale.workers=3", "optim.lr=-1"
    ) == [
        "optim.lr=-1 (command line): must be a number greater than 0",
        "train.global_batch=192 is not a multiple of train.micro_batch=128",
    ]
    assert mistakes(None, "scale.workers=9", "data.streams=2", "head.groups=8") == [
        "scale.workers=9 does not divide the 4 micro-batches of a step "
        "(train.global_batch / train.micro_batch)",
        "data.streams=2 is not a multiple of the 4 micro-batches of a step "
        "(train.global_batch / train.micro_batch)",
        "head.groups=8 is less than scale.workers=9",
    ]
    assert mistakes(None, "optim.final_lr=1") == ["optim.final_lr=1.0 is more than optim.lr=0.1"]
    assert mistakes(None, "data.remote.cache_dir=s3://b/c") == [
        "data.remote.cache_dir=s3://b/c is a URL; it has to be a folder of a disk of each host"
    ]


def test_row_files_lie_on_a_disk() -> None:
    """They lay in a folder called `s3:` behind each worker's working folder."""
    file = "head.bank.memory=file"
    (wrong,) = mistakes(None, file, "run.dir=s3://b/runs")
    assert "but run.dir=s3://b/runs is a URL; let head.bank.path name a folder of a disk" in wrong
    (wrong,) = mistakes(None, file, "head.bank.path=s3://b/rows")
    assert "but head.bank.path=s3://b/rows is a URL" in wrong
    load_config(None, ["data.shards=x", file, "run.dir=s3://b/runs", "head.bank.path=/rows"])
    load_config(None, ["data.shards=x", "run.dir=s3://b/runs"])


@pytest.mark.parametrize(
    ("head", "named"),
    [
        ((), ""),
        (("head.objective=multi_label",), ""),
        (("head.kind=mhp",), "head.kind=mhp"),
        (("head.kind=mhc",), "head.kind=mhc with head.objective=softmax"),
        (("head.kind=full",), ""),
        (("head.kind=partial_fc", "head.objective=multi_label"), ""),
        (("head.mhs.exchange=gather",), ""),
        (("head.kind=mhc", "head.objective=multi_label"), ""),
        (("head.kind=mhc", "head.mhc.multi_label=true"), ""),
    ],
)
def test_heads_that_learn_one_label_refuse_several_by_name(
    head: tuple[str, ...], named: str
) -> None:
    load_config(None, ["data.shards=x", "data.labels_per_sample=1", *head])
    if not named:
        load_config(None, ["data.shards=x", "data.labels_per_sample=4", *head])
        return
    assert mistakes(None, "data.labels_per_sample=4", *head) == [
        f"data.labels_per_sample=4: {named} learns one class per image; full, partial_fc, mhs, and "
        "mhc with head.objective=multi_label learn several"
    ]


def test_labels_are_evaluated_with_their_shards() -> None:
    (wrong,) = mistakes(None, "evaluate.labels=shards")
    assert "evaluate.label_set='' the label set that gives them their classes: give both" in wrong


def test_objectives_of_heads_that_have_none() -> None:
    (wrong,) = mistakes(None, "head.objective=softmax", "head.kind=mhp")
    assert "belongs to head.kind=full or partial_fc or mhs or mhc, but head.kind is mhp" in wrong


def test_a_cascade_takes_several_labels_by_either_key() -> None:
    for keys, expected in (
        ((), False),
        (("head.objective=multi_label",), True),
        (("head.mhc.multi_label=true",), True),
    ):
        config = load_config(None, ["data.shards=x", "head.kind=mhc", *keys])
        assert config.head.cascade_is_multi_label is expected


def elastic(workers: str) -> Config:
    """A run of six micro-batches."""
    sizes = ["train.global_batch=96", "train.micro_batch=16", "data.streams=6"]
    return load_config(None, ["data.shards=x", *sizes, f"scale.workers={workers}"])


def test_workers_may_be_a_range_of_those_that_divide_the_micro_batches() -> None:
    config = elastic("{min: 2, max: 5}")
    assert (config.scale.min_workers, config.scale.workers, config.scale.elastic) == (2, 5, True)
    assert config.group_sizes() == [2, 3]
    assert elastic("3").group_sizes() == [3]
    assert not elastic("3").scale.elastic
    with pytest.raises(UserError, match=r"no number from scale\.min_workers=4 to scale\.workers=5"):
        elastic("{min: 4, max: 5}")
    with pytest.raises(UserError, match=r"scale\.min_workers=3 is more than scale\.workers=2"):
        elastic("{min: 3, max: 2}")


def test_the_best_checkpoint_needs_evaluations() -> None:
    words = ["data.shards=x", "checkpoint.keep_best=rank1", "evaluate.every_steps=5"]
    with pytest.raises(UserError, match=r"checkpoint\.keep_best=rank1 needs evaluate\.every_steps"):
        load_config(None, words)
    load_config(None, [*words, "evaluate.classification=y"])


def test_a_network_is_compiled_whole() -> None:
    with pytest.raises(UserError, match=r"model\.compile=true .* scale\.zero_stage=3"):
        load_config(None, ["data.shards=x", "model.compile=true", "scale.zero_stage=3"])


def test_a_wrong_key_is_not_blamed_twice() -> None:
    assert mistakes(None, "train.micro_batch=-7", "train.global_batch=96") == [
        "train.micro_batch=-7 (command line): must be a whole number greater than 0",
        "train.global_batch=96 is not a multiple of data.streams=64",
    ]


def test_checks_see_defaults_in_place_of_wrong_keys_and_do_not_blame_those() -> None:
    seen = []

    def check(config: Config) -> list[tuple[str, str]]:
        seen.append(config)
        return [("optim.lr", "is low"), ("run.seed", "is odd")]

    with pytest.raises(ConfigErrors) as caught:
        load_config(None, ["data.shards=x", "optim.lr=-1", "run.seed=3"], [check])
    assert [problem.path for problem in caught.value.mistakes] == ["optim.lr", "run.seed"]
    assert (caught.value.mistakes[1].value, caught.value.mistakes[1].message) == (3, "is odd")
    assert seen[0].optim.lr == 0.1


def test_malformed_overrides_do_not_hide_the_rest() -> None:
    assert mistakes(None, "lr", "=3", "optim.betas=[1", "optim.lr=-1") == [
        "command line: `lr` is not of the form key=value; did you mean optim.lr=...?",
        "command line: `=3` is not of the form key=value",
        "command line: `optim.betas=[1`: the value is not YAML: did not find expected ',' or ']'",
        "optim.lr=-1 (command line): must be a number greater than 0",
    ]


@pytest.mark.parametrize(
    "text, words",
    [
        ("run:\n  name: a\n name: b\n", "run.yaml:3: is not YAML: did not find expected"),
        ("run: {}\nrun: {}\n", "run.yaml:2: is not YAML: found duplicate key run"),
        ("- a\n", "run.yaml: must hold keys and values"),
        ("run:\n\tname: a\n", "run.yaml:2: is not YAML: a tab begins the line; indent with spaces"),
        (
            "data: {shards: x}\noptim.lr: 0.2\n",
            "optim.lr=0.2 (run.yaml:2): a file has no dots in its keys; write `optim:` and below "
            "it `lr: ...`",
        ),
        ("hello\n", "run.yaml: must hold keys and values"),
        ("run: !!python/object/apply:os.getcwd []\n", "run.yaml:1: is not YAML: could not deter"),
        (
            "data: {shards: x}\nrun: {name: '${nme}'}\n",
            "run.name=${nme} (run.yaml:2): Interpolation key 'nme' not",
        ),
    ],
)
def test_a_file_that_is_no_configuration(file: str, text: str, words: str) -> None:
    Path(file).write_text(text)
    (line,) = mistakes(file)
    assert line.startswith(words)


def test_a_missing_file_is_told_with_the_likely_one_and_with_wrong_overrides(file: str) -> None:
    assert mistakes("rum.yaml", "optim.lr=-1") == [
        "rum.yaml: there is no such file; did you mean run.yaml?",
        "optim.lr=-1 (command line): must be a number greater than 0",
    ]


def test_a_folder_in_place_of_the_file_is_told_with_the_likely_one(file: str) -> None:
    Path("run").mkdir()
    assert mistakes("run/") == ["run: is a folder, no config; did you mean run.yaml?"]


def test_an_empty_file_is_a_configuration_of_defaults(file: str) -> None:
    Path(file).write_text("# nothing\n")
    assert load_config(file, ["data.shards=x"]) == load_config(None, ["data.shards=x"])


def test_one_mistake_is_one() -> None:
    with pytest.raises(ConfigErrors, match=r"^1 mistake in the configuration:\n  optim\.lr=0 "):
        load_config(None, ["data.shards=x", "optim.lr=0"])


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    config = load_config(
        None,
        ["data.shards=x", "run.name='1e3'", "optim.lr=1e-8", "data.glyphs={}", "run.dir=Größe"],
    )
    path = tmp_path / "new" / "config.yaml"
    save_config(config, str(path))
    assert load_config(str(path)) == config
    assert [item.name for item in path.parent.iterdir()] == ["config.yaml"]
    save_config(config, "memory://runs/config.yaml")


def test_config_to_dict_is_plain() -> None:
    config = load_config(None, ["data.shards=x", "optim.kind=adamw"])
    values = config_to_dict(config)
    assert values["optim"]["betas"] == [0.9, 0.999]
    assert Config.model_validate(values) == config


def test_describe_names_every_key_with_value_default_and_description() -> None:
    entries = {
        entry.path: entry
        for entry in describe_config(load_config(None, ["data.shards=x", "optim.lr=3"]))
    }
    allowed = "a number greater than 0"
    assert tuple(entries["optim.lr"]) == ("optim.lr", 3.0, 0.1, "Peak learning rate.", allowed)
    assert entries["data.shards"].default == "(required)"
    assert entries["data.glyphs"].value is None
    assert "data.glyphs.fonts" not in entries
    assert "optim" not in entries
    assert all(entry.description for entry in entries.values())
    with_glyphs = [
        entry.path
        for entry in describe_config(load_config(None, ["data.shards=x", "data.glyphs={}"]))
    ]
    assert "data.glyphs.fonts" in with_glyphs
    assert "data.glyphs" not in with_glyphs


@pytest.mark.parametrize(
    "kind, override, words",
    [
        ("head.kind=full", "head.mhs.length=7", "belongs to head.kind=mhs, but head.kind is full"),
        ("head.kind=mhs", "head.partial_fc.rate=0.2",
         "belongs to head.kind=partial_fc, but head.kind is mhs"),
        ("head.margin.kind=cosface", "head.margin.m1=2.0",
         "belongs to head.margin.kind=combined, but head.margin.kind is cosface"),
        ("head.margin.kind=none", "head.margin.filter=0.3",
         "belongs to head.margin.kind=softmax or arcface or cosface or combined or adaface, "
         "but head.margin.kind is none"),
        ("optim.kind=adamw", "optim.momentum=0.5",
         "belongs to optim.kind=sgd, but optim.kind is adamw"),
        ("head.optim.kind=sgd", "head.optim.eps=0.1",
         "belongs to head.optim.kind=adamw, but head.optim.kind is sgd"),
        ("optim.schedule=cosine", "optim.power=3.0",
         "belongs to optim.schedule=polynomial, but optim.schedule is cosine"),
    ],
)  # fmt: skip
def test_a_key_of_another_kind_is_refused_with_the_cure(
    kind: str, override: str, words: str
) -> None:
    tag, owner = words.removeprefix("belongs to ").split(",")[0].split(" or ")[0].split("=")
    for overrides in ([kind, override], [override, kind]):
        assert mistakes(None, *overrides) == [
            f"{override} (command line): {words}; leave it out, or set {tag}={owner}"
        ]


def test_keys_of_another_kind_are_told_beside_all_other_mistakes(file: str) -> None:
    Path(file).write_text(
        "data: {shards: x}\nhead:\n  kind: full\n  mhs: {length: 7, extra_heads: 2}\n"
        "  margin:\n    kind: softmax\n    m: 0.3\n    scale: -1\noptim: {lr: -1, betas: [1, 2]}\n"
    )
    assert mistakes(file, "head.mhp.lengths=[3]") == [
        "head.mhs (run.yaml:4): belongs to head.kind=mhs, but head.kind is full; "
        "leave it out, or set head.kind=mhs",
        "head.margin.m=0.3 (run.yaml:7): belongs to head.margin.kind=arcface or cosface or "
        "adaface, but head.margin.kind is softmax; leave it out, or set head.margin.kind=arcface",
        "optim.betas=[1, 2] (run.yaml:9): belongs to optim.kind=adamw, but optim.kind is sgd; "
        "leave it out, or set optim.kind=adamw",
        "head.mhp.lengths=[3] (command line): belongs to head.kind=mhp, but head.kind is full; "
        "leave it out, or set head.kind=mhp",
        "head.margin.scale=-1 (run.yaml:8): must be a number greater than 0",
        "optim.lr=-1 (run.yaml:9): must be a number greater than 0",
    ]


MHS_FILE = """\
data: {shards: x}
head:
  kind: mhs
  mhs: {length: 7}
  margin: {kind: arcface, scale: 32, m: 0.3}
optim: {momentum: 0.8, final_lr: 0.01}
"""


def test_a_kind_of_the_command_line_replaces_that_of_the_file(file: str) -> None:
    Path(file).write_text(MHS_FILE)
    config = load_config(
        file,
        ["head.kind=partial_fc", "head.partial_fc.rate=0.3", "head.margin.kind=softmax",
         "optim.kind=adamw", "optim.schedule=constant"],
    )  # fmt: skip
    assert config.head.partial_fc.rate == 0.3
    assert config.head.margin.scale == 32
    values = config_to_dict(config)
    assert {"kind", "partial_fc"} < values["head"].keys()
    assert values["head"].keys().isdisjoint({"mhs", "mhp", "mhc"})
    assert values["head"]["margin"] == {"kind": "softmax", "scale": 32, "filter": 0.0}
    assert values["optim"].keys().isdisjoint({"momentum", "final_lr", "power"})
    assert load_config(file, ["head.mhs.extra_heads=3"]).head.mhs.length == 7


def test_the_kind_by_default_owns_keys_of_the_file_too(file: str) -> None:
    Path(file).write_text(MHS_FILE.replace("  kind: mhs\n", ""))
    assert config_to_dict(load_config(file, ["head.kind=full"]))["head"]["kind"] == "full"


def test_the_file_has_to_be_right_by_itself(file: str) -> None:
    Path(file).write_text(MHS_FILE.replace("kind: mhs", "kind: full"))
    (line,) = mistakes(file, "head.kind=mhs")
    assert line.startswith("head.mhs.length=7 (run.yaml:4): belongs to head.kind=mhs, but head.kin")


def test_a_wrong_kind_is_one_mistake() -> None:
    assert mistakes(None, "head.kind=mhx", "head.mhp.lengths=[3]") == [
        "head.kind=mhx (command line): must be one of full, partial_fc, mhs, mhp, mhc"
    ]


def test_a_model_refuses_keys_of_another_kind_by_itself() -> None:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"head": {"kind": "full", "mhs": {}, "groups": 0}})
    found = {error["loc"]: error["msg"] for error in caught.value.errors()}
    assert found.keys() == {("data",), ("head", "mhs"), ("head", "groups")}
    assert found["head", "mhs"].startswith("belongs to kind=mhs, but kind is full; ")


def test_a_stored_configuration_of_an_earlier_version_is_read() -> None:
    values = {
        "data": {"shards": "x"},
        "head": {"kind": "mhp", "mhs": {"length": 7}, "mhp": {"lengths": [3, 4]}, "mhc": {}},
        "optim": {"kind": "adamw", "momentum": 0.9, "betas": [0.8, 0.9], "schedule": "constant"},
        "scale": {"workers": 7},  # does not divide the micro-batches: refused today
    }
    config = stored_config(values)
    assert config.head.mhp.lengths == [3, 4]
    assert config.optim.betas == (0.8, 0.9)
    assert "mhs" not in config_to_dict(config)["head"]
    with pytest.raises(ValidationError):
        Config.model_validate(values)


def test_a_renamed_key_names_its_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RENAMED, "optim.rate", "optim.lr")
    assert mistakes(None, "optim.rate=1") == [
        "optim.rate=1 (command line): there is no such key any more; its successor is optim.lr"
    ]


def test_describe_shows_only_what_applies() -> None:
    config = load_config(None, ["data.shards=x", "head.kind=full", "head.margin.kind=none"])
    paths = {entry.path for entry in describe_config(config)}
    assert {"head.kind", "head.margin.kind", "optim.momentum"} < paths
    assert not any(path.startswith(("head.mhs", "head.partial_fc", "head.mh")) for path in paths)
    assert paths.isdisjoint({"head.margin.m", "head.margin.scale", "optim.betas", "optim.power"})


def test_loading_needs_no_torch() -> None:
    code = (
        "import sys; from mhe_dist.config.load import load_config;"
        "load_config(None, ['data.shards=x']);"
        "sys.exit('torch' in sys.modules or 'fsspec' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


PATH_KEYS = [
    "run.dir",
    "data.shards",
    "data.classes",
    "model.init_from",
    "evaluate.shards",
    "head.init_from",
]


@pytest.mark.parametrize("key", PATH_KEYS)
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("~/a b", "/home/me/a b"),
        ("$PLACE/ä%20b?#'c", "s3://bucket/ä%20b?#'c"),
        ("${PLACE}/x", "s3://bucket/x"),
        ("s3://b/~/x", "s3://b/~/x"),
    ],
)
def test_home_and_variables_are_replaced(
    key: str, given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PLACE", "s3://bucket")
    values: Any = {"data": {"shards": "x"}}
    block = values
    *sections, name = key.split(".")
    for section in sections:
        block = block.setdefault(section, {})
    block[name] = given
    assert value_at(Config.model_validate(values), key) == expected


def test_lists_of_paths_are_replaced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(None, ["data.shards=x", "evaluate.verification=[~/lfw.bin]"])
    assert config.evaluate.verification == ["/home/me/lfw.bin"]
    mixed = load_config(None, ["data.shards=~/a", "data.mix=[{shards: ~/b}]"]).data
    assert [mixed.shards, mixed.mix[0].shards] == ["/home/me/a", "/home/me/b"]


@pytest.mark.parametrize(("value", "lack"), [(None, "is not set"), ("", "is empty")])
def test_a_variable_that_is_not_set_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, value: str | None, lack: str
) -> None:
    monkeypatch.delenv("NO_SUCH_PLACE", raising=False)
    if value is not None:
        monkeypatch.setenv("NO_SUCH_PLACE", value)
    with pytest.raises(ConfigErrors) as caught:
        load_config(None, ["data.shards=x", "run.dir=$NO_SUCH_PLACE/runs"])
    (mistake,) = caught.value.mistakes
    assert mistake.path == "run.dir"
    assert mistake.message.startswith(f"the environment variable NO_SUCH_PLACE {lack}; a `$` that")


def test_a_number_as_a_name_says_quote_it(tmp_path: Path) -> None:
    for text, kind in (("2024", "number"), ("yes", "truth value")):
        (tmp_path / "c.yaml").write_text(f"run: {{name: {text}}}\ndata: {{shards: x}}\n")
        with pytest.raises(ConfigErrors, match=rf"YAML reads this as a {kind}: quote it"):
            load_config(str(tmp_path / "c.yaml"))
