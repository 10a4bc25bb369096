"""Every config that ships: it loads, its model can be built, its header is honest."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from mhe_dist.backbone.model import build_backbone
from mhe_dist.config.load import load_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
RUN_HERE = {"quickstart", "glyphs_100", "glyphs_cjk_small", "glyphs_cjk_full"}
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
    assert f"configs/{path.name}" in header
    with torch.device("meta"):
        side = config.data.image_size
        model = build_backbone(config.model, side)
        assert model(torch.zeros(2, 3, side, side)).shape == (2, config.model.embedding_dim)


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
