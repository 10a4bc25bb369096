"""Sweeps without Ray: the space, the plan that is kept, trials, their order and the table."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from launcher import cli
from launcher.sweep import driver, space, trial_run, tuner
from launcher.sweep.trial_run import TRAIN_STEP, SweepSettings, TrialRun
from launcher.sweep.tuner import SweepPlan, TrialResult, check_same_sweep
from launcher.verbs.studies import sweep
from mhe_dist.config.load import load_config
from mhe_dist.errors import RunError, UserError

FILE = "optim.lr: {loguniform: [0.05, 0.5]}\nhead.margin.m: [0.2, 0.3, 0.4]\nrun.seed: [0, 1]\n"


def written(tmp_path: Path, text: str = FILE) -> str:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    return str(file)


def test_every_value_and_both_ends_are_checked_before_anything_starts(tmp_path: Path) -> None:
    found = space.read_space(written(tmp_path))
    assert space.count_trials(found, 2) == 12
    assert space.has_ranges(found)
    assert list(space.example_overrides(found)) == [
        ["optim.lr=0.05", "head.margin.m=0.2", "run.seed=0"],
        ["optim.lr=0.5", "head.margin.m=0.3", "run.seed=1"],
        ["optim.lr=0.5", "head.margin.m=0.4", "run.seed=1"],
    ]


def test_settings_are_what_a_command_line_takes() -> None:
    drawn = {"model.name": "iresnet18", "data.augment.flip": True, "head.mhs.lengths": [4, 5]}
    assert space.as_overrides(drawn) == [
        "model.name=iresnet18",
        "data.augment.flip=true",
        "head.mhs.lengths=[4, 5]",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "optim.lr: {loguniform: [0.05, 0.5]}"),
        ("- 1", "optim.lr: {loguniform: [0.05, 0.5]}"),
        ("optim.lr: [", "is no YAML"),
        ("optim.lr: 0.1", "optim.lr: give a list of values, or one range"),
        ("optim.lr: []", "optim.lr: give a list of values, or one range"),
        ("optim.lr: {logunifrom: [0.1, 1]}", "did you mean loguniform?"),
        ("optim.lr: {uniform: [1, 0.1]}", "uniform takes two numbers, [lowest, highest]"),
        ("optim.lr: {loguniform: [0, 1]}", "loguniform takes two numbers above 0"),
        ("head.mhs.length: {randint: [1.5, 4]}", "randint takes two whole numbers"),
        ("optim.lr: {uniform: [.nan, 1]}", "uniform takes two numbers"),
        ("optim.lr: [0.1]\noptim: {lr: [0.2]}", "optim.lr stands there twice"),
        ("optim.lr: [0.1]\noptim.lr: [0.2]", "optim.lr stands there twice"),
        ("optim: {lr: [0.1], lr: [0.2]}", "optim.lr stands there twice"),
        ("optim: {lr: [0.1]}\noptim: {momentum: [0.2]}", "optim stands there twice"),
    ],
)
def test_a_space_that_is_none(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        space.read_space(written(tmp_path, text))
    assert says in str(error.value)
    assert "space.yaml" in str(error.value)


def test_blocks_may_be_nested_as_in_a_config(tmp_path: Path) -> None:
    text = "optim: {lr: [0.1, 0.2]}\nhead: {margin.m: [0.3], mhs: {length: {randint: [2, 9]}}}\n"
    assert space.read_space(written(tmp_path, text)) == {
        "optim.lr": [0.1, 0.2],
        "head.margin.m": [0.3],
        "head.mhs.length": {"randint": [2, 9]},
    }


def test_ranges_hold_both_ends() -> None:
    tried = space.to_tune({"head.mhs.length": {"randint": [2, 3]}, "run.seed": [0, 1]})
    assert {tried["head.mhs.length"].sample() for _ in range(40)} == {2, 3}
    assert tried["run.seed"] == {"grid_search": [0, 1]}


def plan(tmp_path: Path, **other: Any) -> SweepPlan:
    settings = SweepSettings("quickstart", (), str(tmp_path / "sweep"), "sweep", str(tmp_path))
    values = {"samples": 1, "metric": "rank1", "mode": "max", "stop_early": True, "parallel": 1}
    return SweepPlan(
        **{"settings": settings, "space": {"run.seed": [0, 1]}, "seed": 0} | values | other
    )


def begun(tmp_path: Path, **other: Any) -> Path:
    """A sweep as far as its first trial; the file that says what it is about."""
    found = plan(tmp_path, **other)
    tuner._keep(found)
    (Path(found.settings.out) / tuner.STATE_FOLDER).mkdir()
    return Path(found.settings.out) / "sweep.json"


def test_another_sweep_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    begun(tmp_path)
    check_same_sweep(plan(tmp_path, parallel=2))
    with pytest.raises(
        UserError, match="holds a sweep with another space, metric: name another"
    ) as error:
        check_same_sweep(plan(tmp_path, space={"run.seed": [0, 2]}, metric="accuracy"))
    assert "metric: 'rank1' there, 'accuracy' now" in str(error.value)
    assert "space: {'run.seed': [0, 1]} there, {'run.seed': [0, 2]} now" in str(error.value)


def test_a_sweep_goes_on_on_another_number_of_workers(tmp_path: Path) -> None:
    settings = plan(tmp_path).settings
    begun(tmp_path, settings=settings._replace(overrides=("optim.lr=1", "scale.workers=8")))
    fewer = settings._replace(overrides=("optim.lr=1", "scale.workers=2"))
    check_same_sweep(plan(tmp_path, settings=fewer))
    with pytest.raises(UserError, match=r"another overrides: .*\n  overrides: \['optim.lr=1'\] th"):
        check_same_sweep(plan(tmp_path, settings=settings))


def test_a_sweep_that_ray_refuses_may_be_typed_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file was written before anything could be trained, and refused the cure."""

    @contextmanager
    def refuse(config: object) -> Iterator[None]:
        raise UserError("Lower scale.workers")
        yield

    monkeypatch.setattr(tuner, "local_cluster", refuse)
    with pytest.raises(UserError, match="Lower"):
        tuner.run_sweep(plan(tmp_path), load_config("quickstart"), lambda *_: None)
    assert not list(tmp_path.rglob("sweep.json"))
    tuner._keep(plan(tmp_path))  # and Tune refuses: there is nothing to go on with
    check_same_sweep(plan(tmp_path, space={"run.seed": [0, 2]}))


def test_no_seed_is_drawn_with_that_numpy_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["sweep", "quickstart", "space.yaml", "--seed", "-1"]) == 2
    assert "--seed" in capsys.readouterr().err


def test_what_a_sweep_keeps_holds_no_password(tmp_path: Path) -> None:
    secret = ("tracking.uri=postgresql://u:geheim@h/db", "model.kwargs.token=geheim")
    settings = plan(tmp_path).settings._replace(overrides=secret)
    kept = begun(tmp_path, settings=settings)
    assert "geheim" not in kept.read_text()
    check_same_sweep(plan(tmp_path, settings=settings))
    written = cloudpickle.dumps(tuner._tune_config(plan(tmp_path, settings=settings), 5))
    assert b"geheim" not in written, "Ray Tune writes it into its folder"


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"samples": 2}, "every sample would be the same"),
        ({"space": {"optim.lrr": [1]}}, "did you mean optim.lr"),
        (
            {"space": {"optim.lr": {"uniform": [-1, 1]}}},
            "optim.lr=-1 (space.yaml): must be a number",
        ),
        (
            {"space": {"run.name": ["a", "b"]}},
            "run.name (space.yaml): each run gets a name of its own",
        ),
        (
            {"metric": "rank-1"},
            "--metric rank-1: no evaluation gives it; did you mean rank1? There are rank1, rank5,",
        ),
    ],
)
def test_mistakes_before_ray(tmp_path: Path, other: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        sweep._check(plan(tmp_path, **other), "space.yaml")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"overrides": ("run.dir=elsewhere",)}, "run.dir (command line): each run gets a name"),
        ({"name": "my sweep"}, "run.name=my sweep (the end of --out): must be text of the form"),
    ],
)
def test_names_and_folders_of_runs_are_the_sweeps_own(
    tmp_path: Path, other: dict[str, Any], says: str
) -> None:
    settings = plan(tmp_path).settings._replace(**other)
    with pytest.raises(UserError) as error:
        sweep._check(plan(tmp_path, settings=settings), "space.yaml")
    assert says in str(error.value)


def test_without_evaluations_on_the_way_nothing_is_stopped_early(tmp_path: Path) -> None:
    settings = plan(tmp_path).settings._replace(overrides=("evaluate.every_steps=0",))
    with pytest.raises(UserError, match="--no-stop-early"):
        sweep._check(plan(tmp_path, settings=settings), "space.yaml")


def test_trials_are_compared_by_whatever_is_evaluated(tmp_path: Path) -> None:
    def check(*overrides: str) -> None:
        settings = plan(tmp_path).settings._replace(overrides=("evaluate.shards=", *overrides))
        sweep._check(plan(tmp_path, settings=settings, stop_early=False), "space.yaml")

    with pytest.raises(UserError, match=r"nothing is evaluated.* evaluate\.shards, verif"):
        check()
    with pytest.raises(UserError, match=r"evaluate\.classification=there .*: there is no such fol"):
        check("evaluate.classification=there")


class Task:
    """A run on Ray, seen from a trial: its events come one after the other."""

    def __init__(self, events: list[dict[str, Any]], error: Exception | None = None) -> None:
        self.events, self.error, self.stopped = events, error, False
        self.ended = itertools.count()

    def watch(self, has_ended: Any, handle: Any, stop_requested: Any) -> None:
        for event in self.events:
            handle(event)
        if self.error:
            raise self.error

    def has_ended(self) -> bool:
        return next(self.ended) > 2

    def stop(self) -> bool:
        self.stopped = True
        return True


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`started(events, error)`: a trial of a run that does these."""
    config = load_config("quickstart", [f"run.dir={tmp_path}", "run.name=sweep-00000"])

    def start(events: list[dict[str, Any]], error: Exception | None = None) -> TrialRun:
        monkeypatch.setattr(trial_run, "TrainTask", lambda config, is_alone: Task(events, error))
        return TrialRun(config)

    yield start
    assert (tmp_path / "sweep-00000" / "config.yaml").exists()


LOOK = {"event": "evaluation", "step": 5, "rank1": 0.25, "protocol": "all pairs"}
END = {"event": "end", "summary": {"heldout": {"rank1": 0.5}, "steps": 10}}


def test_a_trial_gives_each_evaluation_and_ends_with_its_run(started: Any) -> None:
    run = started([{"event": "start"}, LOOK, END])
    assert run.next_result() == ({"rank1": 0.25, TRAIN_STEP: 5}, False)
    assert run.next_result() == ({"rank1": 0.5, TRAIN_STEP: 10}, True)
    assert run.next_result() == ({"rank1": 0.5, TRAIN_STEP: 10}, True)


def test_a_trial_ends_with_the_error_of_its_run(started: Any) -> None:
    run = started([LOOK], RunError("rank 1: no memory"))
    run.next_result()
    with pytest.raises(RunError, match="no memory"):
        run.next_result()
    with pytest.raises(RunError, match="without a summary"):
        started([]).next_result()


def test_a_sweep_that_goes_on_knows_what_its_trials_had_reached(tmp_path: Path) -> None:
    """Ray Tune begins with a new scheduler: the second trial would be the best so far."""
    settings = plan(tmp_path).settings
    run = tmp_path / "sweep" / "sweep-00000"
    run.mkdir(parents=True)
    lines = [{"step": 4, "loss": 2.0}, {"step": 4, "heldout/rank1": 0.5, "heldout/chance": 0.1}]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert trial_run.past_results(str(run)) == [{"rank1": 0.5, "chance": 0.1, TRAIN_STEP: 5}]
    scheduler = tuner.create_scheduler(settings, first_look=5)
    scheduler.set_search_properties("rank1", "max")
    first, second = (SimpleNamespace(trial_id=f"a1b2c_0000{number}") for number in range(2))
    scheduler.on_trial_add(None, first)
    scheduler.on_trial_add(None, second)
    worse, better = ({"rank1": value, TRAIN_STEP: 5} for value in (0.25, 0.75))
    assert scheduler.on_trial_result(None, second, worse) == "STOP"
    third = SimpleNamespace(trial_id="a1b2c_00002")
    scheduler.on_trial_add(None, third)
    assert scheduler.on_trial_result(None, third, better) == "CONTINUE"


def test_who_runs_the_sweep_hears_of_results(tmp_path: Path) -> None:
    heard: list[Any] = []
    current = driver.SweepDriver(plan(tmp_path).settings, lambda *words: heard.append(words))
    with driver.driving(current):
        trial_ = SimpleNamespace(trial_id="a1b2c_00003", config={"optim.lr": 0.1})
        driver.create_callback().on_trial_result(1, [], trial_, {"rank1": 0.5})
    assert heard == [("a1b2c_00003", {"optim.lr": 0.1}, {"rank1": 0.5})]


def test_a_sweep_that_is_asked_to_stop_lets_its_runs_save_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    locked = iter([True, True, False])
    monkeypatch.setattr(driver, "_ask_to_save", lambda path: order.append(path[-11:]))
    monkeypatch.setattr(driver, "is_locked", lambda path: next(locked))
    monkeypatch.setattr(driver, "POLL_S", 0.0)
    before = signal.signal(signal.SIGUSR1, lambda *_: order.append("end"))
    trials = [
        SimpleNamespace(trial_id=f"a_0000{number}", status=status)
        for number, status in enumerate(("TERMINATED", "RUNNING", "PENDING"))
    ]
    current = driver.SweepDriver(plan(tmp_path).settings, lambda *_: None)
    try:
        with driver.driving(current):
            callback = driver.create_callback()
            callback.on_step_end(1, trials)
            assert not order
            os.kill(os.getpid(), signal.SIGTERM)
            callback.on_step_end(2, trials)
            callback.on_step_end(3, trials)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert order == ["sweep-00001", "end"]
    assert current.signals == [signal.SIGTERM]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (None, ""),
        (RuntimeError("Traceback\n  File\nRunError: no memory\n"), "RunError: no memory"),
        (SimpleNamespace(cause=UserError("2 mistakes\n  optim.lr")), "2 mistakes"),
    ],
)
def test_a_trial_that_failed_says_why_in_a_line(error: Any, says: str) -> None:
    assert tuner._describe_error(error) == says


def test_the_table_has_the_best_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = [
        TrialResult("sweep-00000", {"run.seed": 0}, 10, 0.25, False, ""),
        TrialResult("sweep-00001", {"run.seed": 1}, 0, None, False, "rank 0: no memory"),
        TrialResult("sweep-00002", {"run.seed": 2}, 90, 0.75, True, ""),
        TrialResult("sweep-00003", {"run.seed": 3}, 90, 0.5, True, ""),
    ]
    sweep._save(plan(tmp_path), trials)
    lines = (tmp_path / "sweep" / "trials.csv").read_text().splitlines()
    assert lines[:2] == ["run,run.seed,step,rank1,state", "sweep-00002,2,90,0.75,complete"]
    assert [line[:11] for line in lines[2:]] == ["sweep-00003", "sweep-00000", "sweep-00001"]
    assert lines[4] == "sweep-00001,1,0,,rank 0: no memory"
    tied = [trials[2], trials[3]._replace(value=0.75)]
    assert sweep._rank(plan(tmp_path), tied) == sweep._rank(plan(tmp_path), tied[::-1]) == tied
    sweep._show(plan(tmp_path), trials)
    shown = capsys.readouterr().out
    assert "mhe train quickstart run.seed=2 run.name=best" in " ".join(shown.split())
    sweep._show(plan(tmp_path), trials[1:2])
    assert "Next" not in capsys.readouterr().out, "no trial is the best"
    assert [t.run for t in sweep._rank(plan(tmp_path, mode="min"), trials)][:2] == [
        "sweep-00003",
        "sweep-00002",
    ]
