"""Which paths of a config a pod keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import cli
from launcher.kubernetes.claim_paths import place_on_claim, require_claim
from mhe_dist.config.schema import Config
from mhe_dist.errors import UserError

QUICKSTART = str(Path(__file__).parents[4] / "configs" / "quickstart.yaml")


def config(**sections: Any) -> Config:
    data = {"shards": "s3://bucket/train"} | sections.pop("data", {})
    run = {"dir": "s3://bucket/runs"} | sections.pop("run", {})
    return Config.model_validate({"data": data, "run": run, **sections})


def test_every_relative_path_goes_to_the_claim() -> None:
    made = config(
        run={"dir": "runs"},
        data={
            "shards": "faces/train",
            "labels": "clean",
            "mix": [{"shards": "./more", "classes": "file://a.txt"}],
        },
        evaluate={"shards": "faces/../heldout", "verification": ["lfw.bin"]},
        model={"init_from": "r50.pth"},
        tracking={"uri": "sqlite:///runs/mlflow.db"},
    )
    placed = place_on_claim(made, "c")
    there = placed.config
    assert there.run.path == "/data/runs/run"
    assert there.data.shards == "/data/faces/train"
    assert there.data.labels == "/data/clean"
    assert (there.data.mix[0].shards, there.data.mix[0].classes) == ("/data/more", "/data/a.txt")
    assert (there.evaluate.shards, there.evaluate.verification) == (
        *("/data/heldout", ["/data/lfw.bin"]),
    )
    assert there.model.init_from == "/data/r50.pth"
    assert there.tracking.uri == "sqlite:////data/runs/mlflow.db"
    assert len(placed.moved) == len(placed.on_claim) == 9
    with pytest.raises(UserError) as refused:
        place_on_claim(made, "")
    assert str(refused.value).count("is relative") == 9
    assert "data.mix.0.shards=./more" in str(refused.value)


def test_what_is_evaluated_during_training_goes_to_the_claim() -> None:
    sets = {"classification": "more", "labels": "tagged", "label_set": "tags"}
    there = place_on_claim(config(evaluate=sets), "c").config.evaluate
    placed = (there.classification, there.labels, there.label_set)
    assert placed == ("/data/more", "/data/tagged", "/data/tags")
    for key in sets:
        with pytest.raises(UserError, match=rf"evaluate\.{key}=/home/me: is in no pod"):
            place_on_claim(config(evaluate=sets | {key: "/home/me"}), "c")


def test_urls_stay_and_need_no_claim() -> None:
    placed = place_on_claim(config(tracking={"uri": "http://mlflow:5000"}), "")
    assert placed.config == config(tracking={"uri": "http://mlflow:5000"})
    require_claim(placed, "")


@pytest.mark.parametrize("path", ["/home/me/runs", "../runs", "/data/../runs", "/database/runs"])
def test_a_path_outside_the_claim_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"run.dir=.*is in no pod: put it on .*run.dir=/data/runs"):
        place_on_claim(config(run={"dir": path}), "c")


def test_scratch_may_end_with_the_pod() -> None:
    scratch = config(data={"remote": {"cache_dir": "/tmp/shards"}})
    assert place_on_claim(scratch, "").config == scratch
    with pytest.raises(UserError, match=r"data.remote.cache_dir=/scratch: give .* /tmp"):
        place_on_claim(config(data={"remote": {"cache_dir": "/scratch"}}), "c")


def test_render_refuses_what_submit_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["k8s", "render", QUICKSTART]) == 2
    said = capsys.readouterr()
    assert not said.out and "run.dir=runs: is relative" in said.err
    assert cli.run(["k8s", "render", QUICKSTART, "--claim", "c"]) == 0
    said = capsys.readouterr()
    job, settings = yaml.safe_load_all(said.out)
    assert job["metadata"]["annotations"]["mhe/path"] == "/data/runs/quickstart"
    values = yaml.safe_load(settings["data"]["run.yaml"])
    assert values["data"]["shards"] == "/data/data/glyphs/train"
    assert "data.shards: data/glyphs/train is /data/data/glyphs/train" in said.err
    assert cli.run(["k8s", "render", QUICKSTART, "--cluster"]) == 0, "a cluster has no paths"
