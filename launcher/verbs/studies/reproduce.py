"""`mhe reproduce`: each comparison of docs/results.md by one command, on a page of its own."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from launcher import execute
from launcher.preflight.checks import check_backbone, check_data
from launcher.preflight.predict import CostPrediction
from launcher.preflight.survey import assess, survey_machine
from launcher.reproduce.page import compare_variants, write_study_page
from launcher.reproduce.plan import PlannedRun, plan_runs
from launcher.reproduce.studies import STUDIES
from launcher.terminal import console
from launcher.terminal.progress import ProgressDisplay, accuracy_rows, format_duration
from launcher.verbs.config import Overrides
from launcher.verbs.data import convert
from launcher.verbs.studies.run_labels import audit_clean_data, make_labels
from launcher.verbs.train import train_to_end
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config
from mhe_dist.errors import UserError
from pipelines.runs.folder import read_run_config, read_summary
from pipelines.runs.resume import refuse_changed_config
from pipelines.shards.label_set import label_set_exists

if TYPE_CHECKING:
    from pipelines.report.comparison_markdown import WrittenPage

TIME_SHARE = 0.9  # of the available minutes; the rest is for what a trial does not predict

Name = Enum("Name", {name: name for name in STUDIES}, type=str)  # type: ignore[misc]


def reproduce(
    study: Annotated[Name, typer.Argument(help="The comparison.")],
    overrides: Overrides = None,
    seeds: Annotated[
        int, typer.Option(min=0, help="Seeds of each variant; 0: as many as the study has.")
    ] = 0,
    only: Annotated[str, typer.Option(metavar="NAME,...", help="Train these variants only.")] = "",
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Without training, only the page is written.")
    ] = True,
    out: Annotated[str, typer.Option(help="Folder of the runs.")] = "runs/reproduce",
    page: Annotated[
        str,
        typer.Option(
            help="The page, plots beside it; results.md in the folder of the runs if left out."
        ),
    ] = "",
) -> None:
    """Train every variant of a comparison, and write a page with tables and plots.

    small: 6,000 classes, seven heads, three seeds each. heads: the same classes and a stronger
    network, six heads with a margin and a learning rate of their own, three seeds each; heads_once:
    five other heads, one seed each; groups: more and more groups; margins: four heads with two
    to four margins. full: more than 80,000 classes, two heads, half an hour each.
    paper100: the paper's heads at 100 classes. components: several labels per image, six
    heads, three seeds each. unlabelled: 400 characters without their labels,
    clustered twice, beside the same with labels. noise: the 6,000 classes with planted faults, and
    audited. Each run is an ordinary run of `mhe train` with a name of its own in the output folder.
    After an interruption the same command continues and keeps complete runs. The page is written
    after every run. A section of an existing page that holds more complete runs than the folder
    stays as it is. The repository's own page is written only if it is named: --page
    docs/results.md.

    Example: mhe reproduce small --only full,mhs_own_plus --seeds 1
    """
    chosen = STUDIES[study.value]
    names = [name.strip() for name in only.split(",")] if only else []
    count = seeds or chosen.seeds
    plans = list(plan_runs(chosen, chosen.select_variants(names), count))
    configs = [settings(plan, overrides or [], out) for plan in plans] if train else []
    target = page or f"{out.rstrip('/')}/results.md"
    written = write_study_page(target, out, chosen, count)
    for number, (plan, config) in enumerate(zip(plans, configs, strict=False), 1):
        console.say(f"[bold]{number}/{len(plans)}  {escape(plan.name)}[/]")
        _train(plan, config, overrides or [], out)
        written = write_study_page(target, out, chosen, count)
    _list_places(written, target, out)
    missing = [row for row in compare_variants(chosen, out, count) if row.missing]
    for row in missing:
        console.say(f"[yellow]Not complete:[/] {escape(row.unfinished)}")
    again = ["mhe", "reproduce", chosen.name, *(overrides or [])]
    again += ["--seeds", str(count), "--out", out, *(["--page", page] if page else [])]
    steps = [("train what is missing", again)] if missing else []
    complete = [each.name for each in plans if read_summary(f"{out}/{each.name}")]
    steps += [("a run on a page", ["mhe", "report", f"{out}/{name}"]) for name in complete[:1]]
    console.list_next(steps)


def _list_places(written: WrittenPage, target: str, out: str) -> None:
    """Say where the page is, and which of its sections stayed as they were."""
    places = [("page and pictures", ", ".join(written.files)), ("runs", out)]
    console.list_rows("Where it is", places)
    for title in written.kept:
        console.say(
            f"[yellow]{escape(target)} keeps its section[/] {escape(title)!r}: it holds more "
            f"complete runs than {escape(out)}. To replace it, delete that section, or name "
            "another page: --page FILE"
        )


def settings(plan: PlannedRun, overrides: list[str], out: str) -> Config:
    """The config of a run; `overrides` are those of the command line for all runs.

    Raises:
        UserError: an override is wrong, or the run was begun with other settings.
    """
    words, checks = [*plan.overrides, *overrides, f"run.dir={out}"], [check_data, check_backbone]
    if plan.planted:
        words.append(f"data.shards={out}/{plan.planted}/train")
    if plan.variant.clustered_by:
        words.append(f"data.labels_per_sample={plan.study.labels_per_image}")
    if plan.labels:
        labels = f"{out}/{plan.labels}"
        words.append(f"data.labels={labels}")
        if not label_set_exists(labels):
            checks = [check_backbone]  # the labels are made when it is their turn
    config = load_config(plan.study.file, words, checks)
    before = read_run_config(config.run.path)
    if plan.study.minutes and before and not config.train.max_steps:
        config.train.max_steps = before["train"]["max_steps"]  # what a trial found
    refuse_changed_config(config)
    return config


def _train(plan: PlannedRun, config: Config, overrides: list[str], out: str) -> None:
    """Train a run to its end, unless it is complete."""
    summary, minutes = read_summary(config.run.path), plan.study.minutes
    if summary is None:
        if plan.labels:
            clean = load_config(plan.study.file, [*plan.overrides, *overrides, f"run.dir={out}"])
            make_labels(plan, config, clean, out)
        if minutes and not config.train.max_steps:
            config.train.max_steps = _steps_in(minutes, config)
        summary = train_to_end(config)
    if plan.audit and not plan.planted:
        audit_clean_data(plan, config, out)
    figures = ", ".join(f"{name} {value}" for name, value in accuracy_rows(summary["heldout"]))
    console.say(f"complete: {figures}")


def _steps_in(minutes: float, config: Config) -> int:
    """Number of steps that a run takes in that time, as a trial of all workers predicts."""
    with convert.resumable(), ProgressDisplay() as display:
        execute.make_data(config, display)
        display.waiting("trying some steps, to see how many the time allows")
        found = assess(config, survey_machine(config, True), True)
    if found is None:
        raise UserError(f"data.shards={config.data.shards}: nothing is there to try steps on")
    steps = steps_in(60 * minutes, found)
    console.say(
        f"A step takes about {found.step_s:.2f} s: "
        f"{steps:,} steps in {format_duration(60 * minutes)}."
    )
    return steps


def steps_in(seconds: float, found: CostPrediction) -> int:
    """Number of steps that fit into that time, with a reserve."""
    return max(1, int(TIME_SHARE * seconds / found.step_s))
