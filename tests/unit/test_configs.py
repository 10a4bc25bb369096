"""Every config that ships: it loads, its model can be built, its header is honest."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from omegaconf import OmegaConf

from mhe_dist.backbone.model import build_backbone
from mhe_dist.config.auto.head_sizes import MOST_CLASSES_OF_FULL, choose_kind
from mhe_dist.config.json_schema import json_schema
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config
from mhe_dist.config.shipped import shipped_configs
from mhe_dist.config.write import config_to_dict
from mhe_dist.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
RUN_HERE = {
    *("quickstart", "glyphs_100", "glyphs_heads", "glyphs_cjk_small", "glyphs_cjk_full"),
    *("glyphs_noise", "glyphs_components", "unlabelled"),
}
PAPER = {  # classes, and heads {H; L} of arXiv 2412.10182
    "ms1mv2_r100": (85_742, 43, 1994),
    "ms1mv3_r100": (93_431, 13, 7187),
    "casia_r18": (10_572, 12, 881),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_says_where_it_was_run(path: Path) -> None:
    config = load_config(str(path))
    header = re.match(r"(#.*\n)+", path.read_text())[0]
    for word in ("# Command:", "# Hardware:", "# Data:", "# Result:"):
        assert word in header
    assert ("not run here" in header) == (path.stem not in RUN_HERE)
    assert f"mhe train {path.stem}" in header
    with torch.device("meta"):
        side = config.data.image_size
        model = build_backbone(config.model, side)
        assert model(torch.zeros(2, 3, side, side)).shape == (2, config.model.embedding_dim)


def values_of(path: Path) -> dict[str, Any]:
    """A file as an editor reads it: without defaults."""
    return OmegaConf.to_container(OmegaConf.load(path))


def faults(values: dict[str, Any]) -> list[str]:
    """What the schema in the repository has against some values: dotted path and message."""
    schema = json.loads((CONFIGS[0].parent / "schema.json").read_text())
    found = jsonschema.Draft202012Validator(schema).iter_errors(values)
    return sorted(f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found)


def test_the_schema_in_the_repository_is_current() -> None:
    written = (CONFIGS[0].parent / "schema.json").read_text()
    current = json.dumps(json_schema(), indent=2) + "\n"
    assert written == current, "run: mhe config --schema > configs/schema.json"
    jsonschema.Draft202012Validator.check_schema(json.loads(written))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_editors_find_the_schema_and_it_fits(path: Path) -> None:
    first, second = path.read_text().splitlines()[:2]
    assert first == "# yaml-language-server: $schema=schema.json"
    assert second.startswith("# ")
    assert faults(values_of(path)) == []


@pytest.mark.parametrize(
    ("section", "key", "value", "fault"),
    [
        ("optim", "learning_rate", 0.1, "optim: Additional properties .*'learning_rate' was unexp"),
        ("optim", "lr", -1, "optim.lr: -1 is less than or equal to the minimum of 0"),
        # Keys of another kind: `false` is what editors word best.
        ("optim", "betas", [0.8, 0.9], r"optim: False schema does not allow \[0.8, 0.9\]"),
        ("optim", "power", 3, "optim: False schema does not allow 3"),
        ("head", "partial_fc", {"rate": 0.1}, "head: False schema does not allow {'rate': 0.1}"),
        ("head", "kind", "full", "head: False schema does not allow {'length': 64,"),
        ("head", "margin", {"m1": 2}, "head.margin: False schema does not allow 2"),
        (
            "head",
            "margin",
            {"kind": "none", "m": 0.5},
            "head.margin: False schema does not allow 0",
        ),
        ("scale", "workers", {"min": 1}, "scale.workers: {'min': 1} is not valid under any"),
    ],
)
def test_the_schema_refuses_mistakes(section: str, key: str, value: object, fault: str) -> None:
    values = values_of(CONFIGS[0].with_name("quickstart.yaml"))
    values[section][key] = value
    (found,) = faults(values)
    assert re.match(fault, found)


def test_the_schema_knows_what_the_models_allow() -> None:
    values = values_of(CONFIGS[0].with_name("quickstart.yaml"))
    values["head"] = {"kind": "partial_fc", "partial_fc": {"rate": 0.2}, "optim": {"momentum": 0}}
    values["optim"] = {"kind": "adamw", "betas": [0.8, 0.9], "schedule": "polynomial", "power": 3}
    values["scale"] = {"workers": {"min": 1, "max": 2}}
    values["data"]["glyphs"] = None
    assert faults(values) == []
    Config.model_validate(values)
    assert faults(config_to_dict(load_config("quickstart"))) == []


def test_configs_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart").run.name == "quickstart"
    assert list(shipped_configs()) == [path.stem for path in CONFIGS]
    Path("quickstart").write_text("data: {shards: x}\nrun: {name: mine}\n")
    assert load_config("quickstart").run.name == "mine"
    with pytest.raises(UserError, match=r"quikstart: there is no such file; did you mean .*quicks"):
        load_config("quikstart")
    with pytest.raises(UserError, match=r"nothing: there is no such file\. These come with mhe: "):
        load_config("nothing")
    with pytest.raises(UserError, match=r"configs/quickstart\.yaml: .* did you mean quickstart\?"):
        load_config("configs/quickstart.yaml")


@pytest.mark.parametrize("name", PAPER)
def test_the_heads_are_the_papers(name: str) -> None:
    classes, heads, length = PAPER[name]
    config = load_config(str(CONFIGS[0].with_name(f"{name}.yaml")))
    assert config.head.mhs.length == length
    assert math.ceil(classes / length) == heads
    assert config.head.mhs.negatives == "batch"
    assert (config.head.margin.scale, config.head.margin.m) == (64, 0.5)
    header = CONFIGS[0].with_name(f"{name}.yaml").read_text().split("run:")[0]
    assert f"{classes:,} identities" in header


def test_few_people_get_the_head_that_the_guide_takes() -> None:
    """It was mhs, with a note in the guide that full is better up to 20,000 classes."""
    path = CONFIGS[0].with_name("finetune_faces.yaml")
    assert load_config(str(path)).head.kind == choose_kind(MOST_CLASSES_OF_FULL) == "full"
    assert f"up to {MOST_CLASSES_OF_FULL:,} people" in path.read_text()
    guide = (CONFIGS[0].parents[1] / "docs" / "choosing.md").read_text()
    assert f"| up to {MOST_CLASSES_OF_FULL:,} | `head.kind: full` |" in guide


RECIPE = "optimizer, schedule, batch and epochs of arcface_torch's recipe"


def test_who_claims_a_recipe_follows_it() -> None:
    """What its train_v2.py, lr_scheduler.py and partial_fc_v2.py do."""
    claiming = [path for path in CONFIGS if RECIPE in path.read_text()]
    assert len(claiming) == 5
    for path in claiming:
        config = load_config(str(path))
        assert config.optim.clip_norm == 5
        assert (config.optim.schedule, config.optim.power) == ("polynomial", 1)
        assert config.optim.decay_vectors
        assert config.head.optim.weight_decay == config.optim.weight_decay
        length = config.head.bank.init_length
        assert length == pytest.approx(0.01 * config.model.embedding_dim**0.5, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "classes", "share"),
    [
        ("glint360k_r100", 360_232, 0.1),
        ("webface42m_r100", 2_059_906, 0.02),
        ("glyphs_cjk_full", 93_966, 0.1),
    ],
)
def test_a_sample_sees_the_share_of_the_classes_that_the_header_says(
    name: str, classes: int, share: float
) -> None:
    path = CONFIGS[0].with_name(f"{name}.yaml")
    head = load_config(str(path)).head
    seen = (1 + head.mhs.extra_heads) * head.mhs.length  # all of its own group
    assert seen / classes == pytest.approx(share, rel=0.01)
    assert seen < classes / head.groups
    assert f"{classes:,} identities" in path.read_text()
