"""`mhe reproduce`: valid runs, trained once each, a page of what is there."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet as pq

from launcher import cli, execute
from launcher.reproduce.plan import PlannedRun, Study, Variant, plan_runs
from launcher.reproduce.studies import NOISE, PAPER, SMALL, STUDIES, UNLABELLED
from launcher.signals import Interrupted
from launcher.terminal import console
from launcher.verbs.studies import reproduce, run_labels
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config
from mhe_dist.config.shipped import shipped_configs
from mhe_dist.config.write import config_to_dict
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from pipelines.clustering.settings import ClusterSettings
from pipelines.runs.folder import read_run_config

Captured = pytest.CaptureFixture[str]

HELDOUT = {"rank1": 0.9, "chance": 0.1, "accuracy": 0.9, "tar@far=1e-4": 0.5}
HELDOUT |= {"classification/top1": 0.8}
SIZES = {"gallery": 10.0, "probes": 20.0}
SEEN = {  # of 6,000 classes, by 64 samples
    "full": 6000,
    "partial_fc": 600,
    "mhs_own": 100,
    "mhs_own_plus": pytest.approx(600, abs=100),  # 100 less where the own head is drawn, too
    "mhs_batch": pytest.approx(640, abs=100),  # two samples may share a head of 10
    "mhp": 78 + 77,
    "mhc": pytest.approx(78 + 8 * 77, abs=8),  # and the gold's children if it is none of the 8
}


def config_of(plan: PlannedRun) -> Config:
    return load_config(plan.study.config, plan.overrides)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_variant_is_a_valid_run_of_its_own_name(study: Study) -> None:
    plans = list(plan_runs(study, study.variants, 2))
    configs = [config_of(plan) for plan in plans]
    assert len({config.run.path for config in configs}) == len(plans)
    assert [config.run.seed for config in configs] == sorted([0, 1] * len(study.variants))
    evaluated = configs[0].evaluate
    labels = ["labels"] if evaluated.labels else []
    assert set(dict(study.typefaces)) == {*evaluated.typefaces, *labels}
    assert study.config in shipped_configs()
    if study.classes:
        return  # of the label sets of `unlabelled`: see the test of its order
    shared = [{**config_to_dict(config), "head": 0, "run": 0} for config in configs]
    assert all(values == shared[0] for values in shared), "only head and seed may differ"


def classes_seen(config: Config, classes: int) -> float:
    """Mean over the samples of a step of one micro-batch."""
    spec = HeadSpec(config.head, classes, 16, config.run.seed, 1)
    head = build_head(spec, Topology())
    labels = torch.arange(64)[None] * 89 % classes
    head.plan(0, labels)
    return head(torch.randn(64, 16), labels[0]).metrics["classes_seen"].item()


@pytest.mark.parametrize("variant", SMALL.variants, ids=lambda variant: variant.name)
def test_the_variants_see_what_they_say(variant: Variant) -> None:
    config = config_of(next(plan_runs(SMALL, [variant], 1)))
    assert classes_seen(config, 6000) == SEEN[variant.name]


@pytest.mark.parametrize("variant", PAPER.variants, ids=lambda variant: variant.name)
def test_the_papers_heads_fit_a_hundred_classes(variant: Variant) -> None:
    config = config_of(next(plan_runs(PAPER, [variant], 1)))
    assert 14 <= classes_seen(config, 100) <= 100


class Trainer:
    """In place of Ray: leaves behind what a run does, and remembers which ones it was given."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.stop_after = 99

    def __call__(
        self, config: Config, handle: Callable[[dict[str, object]], None], *_: bool
    ) -> None:
        if len(self.trained) == self.stop_after:
            raise Interrupted(2)
        self.trained.append(config.run.name)
        heldout = HELDOUT | SIZES
        for name in config.evaluate.typefaces:
            heldout |= {f"{name}/{key}": value for key, value in (HELDOUT | SIZES).items()}
        summary = {"heldout": heldout, "images_per_s": 1.0, "phases": {"train": 60.0}}
        summary |= {"steps": config.train.max_steps or 7, "samples": 100}
        Path(config.run.path, "summary.json").write_text(json.dumps(summary))
        record = {"step": 6, "classes_seen": 5.0, "head_time": 0.1, "peak_rss_gib": 1.0}
        Path(config.run.path, "metrics.jsonl").write_text(json.dumps(record) + "\n")
        handle({"event": "end", "summary": summary})


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """No Ray, an empty folder to work in, and data as far as checks can see."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "index.json").write_text("{}")
    trainer = Trainer()
    monkeypatch.setattr(execute, "train_locally", trainer)
    monkeypatch.setattr(execute, "check_selection", lambda config: None)
    monkeypatch.setattr(console, "capture_logs", lambda log: nullcontext())
    return trainer


DATA = [
    *("data.glyphs=null", "data.shards=shards"),
    *("evaluate.shards=shards", "evaluate.classification="),
]


def mhe(*words: str) -> int:
    return cli.run(["reproduce", *words, *DATA])


@pytest.mark.slow
def test_complete_runs_are_kept_and_the_others_trained(trainer: Trainer, capsys: Captured) -> None:
    assert mhe("small", "--only", "full,mhp", "--seeds", "1") == 0
    assert trainer.trained == ["small-full-seed0", "small-mhp-seed0"]
    said = capsys.readouterr().out
    assert "2/2  small-mhp-seed0" in said
    assert "Not complete: PartialFC 0.1: seed 0" in said
    assert "mhe reproduce small data.glyphs=null" in said
    before = Path("runs/reproduce/small-full-seed0/summary.json").stat().st_mtime_ns
    assert mhe("small", "--only", "full", "--seeds", "2") == 0
    assert trainer.trained[2:] == ["small-full-seed1"]
    assert Path("runs/reproduce/small-full-seed0/summary.json").stat().st_mtime_ns == before
    page = Path("runs/reproduce/results.md").read_text()
    assert "| full softmax | 2 |" in page
    assert "| MHP {78;77} | 1 |" in page
    assert "MHP {78;77}: seed 1;" in page
    assert Path("runs/reproduce/results-small.png").exists()


def test_without_labels_each_round_clusters_what_the_one_before_embeds(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, untrained = [], []

    def make_label_set(shards: str, model: str, out: str, settings: ClusterSettings) -> None:
        made.append((shards, model.rpartition("/")[2], out.rpartition("/")[2], settings))
        Path(out).mkdir(parents=True)
        Path(out, "labels.json").write_text("{}")

    monkeypatch.setattr(run_labels, "make_label_set", make_label_set)
    monkeypatch.setattr(
        "pipelines.runs.untrained.write_untrained_run",
        lambda config: untrained.append((config.run.path, config.run.seed, config.data.labels)),
    )
    monkeypatch.setattr(reproduce, "check_data", lambda config: ())
    trainer.stop_after = 2
    assert mhe("unlabelled") == 130
    trainer.stop_after = 9
    assert mhe("unlabelled") == 0
    names = ["start", "round1", "round2", "labels"]
    assert trainer.trained == [f"unlabelled-{name}-seed0" for name in names]
    assert [entry[1:3] for entry in made] == [
        (f"unlabelled-{by}-seed0", f"unlabelled-{name}-seed0-labels")
        for by, name in zip(["untrained", *names], names[:3], strict=False)
    ]
    settings = ClusterSettings(UNLABELLED.classes, UNLABELLED.labels_per_image, seed=0)
    assert all(entry[0] == "shards" and entry[3] == settings for entry in made)
    assert [entry[:2] for entry in untrained] == [("runs/reproduce/unlabelled-untrained-seed0", 0)]
    runs = [read_run_config(f"runs/reproduce/unlabelled-{name}-seed0") for name in names]
    assert [run and run["data"]["labels"] for run in runs] == [
        *(f"runs/reproduce/unlabelled-{name}-seed0-labels" for name in names[:3]),
        "",
    ]
    assert [run and run["data"]["labels_per_sample"] for run in runs] == [4, 4, 4, 0]


@pytest.mark.slow
def test_noise_plants_once_a_seed_and_audits_with_the_run_before(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted, audited = [], []

    def write_labels(folder: str) -> None:
        Path(folder).mkdir(parents=True)
        Path(folder, "labels.json").write_text("{}")

    def plant(plan: PlannedRun, clean: Config, out: str) -> None:
        if not Path(out, plan.planted).exists():
            planted.append((plan.planted, clean.data.shards, clean.data.labels))
            write_labels(f"{out}/{plan.planted}/labels")
            plan_table = {"kind": ["relabelled", "relabelled"], "sample": [3, 4]}
            plan_table |= {name: [-1, -1] for name in ("planted_class", "second_planted_class")}
            pq.write_table(pa.table(plan_table), f"{out}/{plan.planted}/plan.parquet")

    def audit(plan: PlannedRun, by: str, shards: str, labels: str, clean: Config, out: str) -> None:
        audited.append((plan.audit, by, shards, labels, clean.evaluate.shards))
        write_labels(f"{out}/{plan.audit}/labels")
        found = {"kind": ["wrong_label"], "sample": [3], "class": [0], "neighbour_class": [1]}
        pq.write_table(pa.table(found), f"{out}/{plan.audit}/findings.parquet")
        totals = {"images": 100, "classes": 10, "images_doubted": 1, "classes_doubted": 0}
        figures = {"false_rate": 0.01, "totals": totals}
        Path(out, plan.audit, "figures.json").write_text(json.dumps(figures))

    monkeypatch.setattr(run_labels, "_plant", plant)
    monkeypatch.setattr(run_labels, "_audit", audit)
    monkeypatch.setattr(reproduce, "check_data", lambda config: ())
    trainer.stop_after = 4
    assert mhe("noise", "--seeds", "1") == 130
    trainer.stop_after = 9
    assert mhe("noise", "--seeds", "1") == 0
    names = ["clean", "dirty", "filter", "audited1", "audited2"]
    assert trainer.trained == [f"noise-{name}-seed0" for name in names]
    out = "runs/reproduce"
    dirty = (f"{out}/noise-planted-seed0/train", f"{out}/noise-planted-seed0/labels", "shards")
    assert planted == [("noise-planted-seed0", "shards", "")]
    assert audited == [
        ("noise-clean-seed0-audit", "noise-clean-seed0", "shards", "", "shards"),
        ("noise-audited1-seed0-audit", "noise-dirty-seed0", *dirty),
        ("noise-audited2-seed0-audit", "noise-audited1-seed0", *dirty),
    ]
    runs = [read_run_config(f"{out}/{name}") for name in trainer.trained]
    assert [(run["data"]["shards"], run["data"]["labels"]) for run in runs if run] == [
        ("shards", ""),
        dirty[:2],
        dirty[:2],
        (dirty[0], f"{out}/noise-audited1-seed0-audit/labels"),
        (dirty[0], f"{out}/noise-audited2-seed0-audit/labels"),
    ]
    page = Path(out, "results.md").read_text()
    assert "| audited once | relabelled images | 2 | 1 | 100.0 | 50.0 |" in page
    assert "1 of 100 images and 0 of 10 classes are accused" in page
    assert "the faults cost 0.00 points of rank-1" in page


def test_faults_are_planted_into_the_clean_data_with_the_seed_of_the_run(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Index(NamedTuple):
        """In place of a data set."""

        folder: str
        samples: int = 1000

    def plant(train: Index, heldout: Index, *words: object) -> None:
        calls.append(("planted", *words))
        Path(f"{words[1]}/labels").mkdir(parents=True)
        Path(f"{words[1]}/labels/labels.json").write_text("{}")

    monkeypatch.setattr(execute, "make_data", lambda config, display: calls.append("made"))
    monkeypatch.setattr("pipelines.shards.index.ShardIndex.load", Index)
    monkeypatch.setattr(
        "pipelines.sources.planted.unseen_glyphs.draw_unseen_glyphs",
        lambda sets, *words: calls.append(("drawn", *(s.folder for s in sets), *words)) or ["x"],
    )
    monkeypatch.setattr("pipelines.sources.planted.dirty_set.plant_faults", plant)
    dirty = next(p for p in plan_runs(NOISE, NOISE.variants, 4) if p.planted and p.seed == 3)
    for _ in range(2):  # the second time nothing is left to do
        run_labels.make_labels(dirty, config_of(dirty), config_of(dirty), "out")
    assert NOISE.faults is not None
    assert calls == [
        "made",
        ("drawn", "data/han_small/train", "data/han_small/heldout", "fonts", 32, 20, 3),
        ("planted", ["x"], "out/noise-planted-seed3", 3, NOISE.faults),
    ]


@pytest.mark.slow
def test_an_interrupted_study_goes_on_run_by_run(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(sys, "argv", ["mhe", "reproduce", "paper100"])
    trainer.stop_after = 2
    assert mhe("paper100", "--seeds", "1") == 130
    assert "mhe reproduce paper100" in capsys.readouterr().out
    assert "| MHP {10;10} | 1 |" in Path("runs/reproduce/results.md").read_text()
    trainer.stop_after = 99
    assert mhe("paper100", "--seeds", "1") == 0
    assert trainer.trained == [f"paper100-{variant.name}-seed0" for variant in PAPER.variants]
    assert "Not complete" not in Path("runs/reproduce/results.md").read_text()


def test_the_page_of_what_is_there_trains_nothing(trainer: Trainer) -> None:
    assert mhe("paper100", "--only", "one_hot", "--seeds", "1") == 0
    assert mhe("small", "--no-train", "--page", "other.md") == 0
    assert trainer.trained == ["paper100-one_hot-seed0"]
    page = Path("other.md").read_text()
    assert "## 6,000 classes" in page  # asked for
    assert "| one-hot | 1 |" in page  # begun
    assert "80,000" not in page


def test_the_page_of_the_repository_is_written_only_if_it_is_named(trainer: Trainer) -> None:
    page = Path("docs/results.md")
    page.parent.mkdir()
    page.write_text(own := "# Results\n\nWritten by `mhe reproduce`: the repository's own\n")
    assert mhe("paper100", "--only", "one_hot", "--seeds", "1") == 0
    assert mhe("paper100", "--no-train") == 0
    assert page.read_text() == own
    assert "| one-hot | 1 |" in Path("runs/reproduce/results.md").read_text()
    assert mhe("paper100", "--no-train", "--page", "docs/results.md") == 0
    assert "| one-hot | 1 |" in page.read_text()


@pytest.mark.parametrize("study", ["noise", "unlabelled"])
def test_labels_that_a_study_makes_need_files_of_this_machine(
    study: str, trainer: Trainer, capsys: Captured
) -> None:
    """An audit was refused after the training, and looked for its figures in `./memory:`."""
    assert cli.run(["reproduce", study, "--out", "memory://studies"]) == 2
    assert f"the labels and audits of {study} are made in files" in capsys.readouterr().err
    assert trainer.trained == []


def test_a_name_for_all_runs_is_refused(trainer: Trainer, capsys: Captured) -> None:
    assert mhe("paper100", "--seeds", "1", "run.name=mine") == 2
    assert "run.name (command line): each run gets a name of its own" in capsys.readouterr().err
    assert not trainer.trained


def test_settings_are_checked_where_nothing_is_trained(trainer: Trainer, capsys: Captured) -> None:
    assert mhe("paper100", "--no-train", "optim.lrr=1") == 2
    assert "optim.lrr=1 (command line): there is no such key" in capsys.readouterr().err
    assert not Path("runs/reproduce/results.md").exists()


def test_a_file_that_is_no_page_is_not_replaced_by_one(trainer: Trainer, capsys: Captured) -> None:
    config = Path("run.yaml")
    config.write_text("data: {shards: mine}\n")
    assert mhe("paper100", "--no-train", "--page", str(config)) == 2
    assert "--page run.yaml: is no page that mhe reproduce wrote" in capsys.readouterr().err
    assert config.read_text() == "data: {shards: mine}\n"


@pytest.mark.slow
def test_a_page_never_loses_results_to_a_folder_with_fewer(
    trainer: Trainer, capsys: Captured
) -> None:
    page = Path("docs/results.md")
    assert mhe("paper100", "--only", "one_hot", "--seeds", "2", "--page", str(page)) == 0
    before, picture = page.read_text(), Path("docs/results-paper100.png").read_bytes()
    words = ("--page", str(page), "--out", "elsewhere")
    assert mhe("paper100", "--no-train", *words) == 0
    assert "keeps its section '100 classes" in capsys.readouterr().out
    assert mhe("paper100", "--only", "one_hot", "--seeds", "1", *words) == 0
    assert page.read_text() == before
    assert mhe("small", "--only", "full", "--seeds", "1", *words) == 0
    assert "| full softmax | 1 |" in page.read_text()
    assert "| one-hot | 2 |" in page.read_text()
    assert Path("docs/results-paper100.png").read_bytes() == picture
    capsys.readouterr()
    assert mhe("paper100", "--only", "one_hot", "--seeds", "2", *words) == 0
    assert "keeps" not in capsys.readouterr().out


def test_the_page_in_docs_is_read_as_it_is_written_and_keeps_the_order_of_the_studies(
    trainer: Trainer,
) -> None:
    """Studies without a run in the folder came last: the first one, whose data others use."""
    own = Path(__file__).parents[5] / "docs" / "results.md"
    page = Path("docs/results.md")
    page.parent.mkdir()
    page.write_text(own.read_text())
    assert mhe("small", "--no-train", "--page", str(page)) == 0
    for row in (line for line in own.read_text().splitlines() if line.startswith("|")):
        assert row in page.read_text()
    titles = re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE)
    assert titles == [study.title for study in STUDIES.values()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["small", "--only", "mhs_ownplus"], "did you mean mhs_own_plus"),
        (["small", "optim.lrr=1"], "did you mean optim.lr"),
        (["large"], "'large' is not one of"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    trainer: Trainer, capsys: Captured, words: list[str], message: str
) -> None:
    assert mhe(*words) == 2
    # Without the frame: where a line in it ends is rich's affair.
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not trainer.trained


def test_runs_that_were_begun_with_other_settings_are_refused(
    trainer: Trainer, capsys: Captured
) -> None:
    assert mhe("small", "--only", "full", "--seeds", "1") == 0
    assert mhe("small", "--only", "full", "--seeds", "1", "optim.lr=0.1") == 2
    assert "optim.lr: 0.4 in the run, 0.1 now" in capsys.readouterr().err
