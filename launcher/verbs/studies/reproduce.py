"""`mhe reproduce`: each comparison of docs/results.md by one command, on a page of its own."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from launcher.preflight.checks import check_data, check_names
from launcher.reproduce.page import compare_variants, write_study_page
from launcher.reproduce.plan import PlannedRun, plan_runs
from launcher.reproduce.studies import STUDIES
from launcher.terminal import console
from launcher.terminal.progress import accuracy_rows
from launcher.verbs.options import Overrides
from launcher.verbs.outputs import usable_file, usable_folder
from launcher.verbs.studies.run_keys import refuse_run_keys
from launcher.verbs.studies.run_labels import audit_clean_data, make_labels
from launcher.verbs.train import train_to_end
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config
from pipelines.runs.folder import read_summary
from pipelines.runs.resume import refuse_changed_config
from pipelines.shards.label_set import label_set_exists

if TYPE_CHECKING:
    from pipelines.report.comparison_markdown import WrittenPage

Name = Enum("Name", {name: name for name in STUDIES}, type=str)  # type: ignore[misc]


def reproduce(
    study: Annotated[Name, typer.Argument(help="The comparison.")],
    overrides: Overrides = None,
    seeds: Annotated[
        int, typer.Option(min=0, max=1000, help="Seeds of each variant; 0: the study's own number.")
    ] = 0,
    only: Annotated[str, typer.Option(metavar="NAME,...", help="Train these variants only.")] = "",
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Without training, only the page is written.")
    ] = True,
    out: Annotated[
        str, typer.Option(help="Folder of the runs.", callback=usable_folder)
    ] = "runs/reproduce",
    page: Annotated[
        str,
        typer.Option(
            help="The page, plots beside it; results.md in the folder of the runs if left out.",
            callback=usable_file,
        ),
    ] = "",
) -> None:
    """Train every variant of a comparison, and write a page with tables and plots.

    small: 6,000 classes, seven heads, three seeds each. heads: the same classes and a stronger
    network, six heads with a margin and a learning rate of their own, three seeds each; heads_once:
    five other heads, one seed each; groups: more and more groups; margins: four heads with two
    to four margins. full: 94,000 classes, four heads.
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
    refuse_run_keys(overrides or [], "command line")
    plans = list(plan_runs(chosen, chosen.select_variants(names), count))
    configs = [settings(plan, overrides or [], out) for plan in plans] if train or overrides else []
    target = page or f"{out.rstrip('/')}/results.md"
    written = write_study_page(target, out, chosen, count)
    for number, (plan, config) in enumerate(zip(plans, configs, strict=True) if train else (), 1):
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
        UserError: an override is wrong, the run was begun with other settings, or it needs files of
            this machine and `out` is in a store.
    """
    from pipelines.clustering.rows import refuse_remote_target

    if plan.labels or plan.audit:
        refuse_remote_target(out, f"the labels and audits of {plan.study.name} are")
    words, checks = [*plan.overrides, *overrides, f"run.dir={out}"], [check_data, check_names]
    if plan.planted:
        words.append(f"data.shards={out}/{plan.planted}/train")
    if plan.variant.clustered_by:
        words.append(f"data.labels_per_sample={plan.study.labels_per_image}")
    if plan.labels:
        labels = f"{out}/{plan.labels}"
        words.append(f"data.labels={labels}")
        if not label_set_exists(labels):
            checks = [check_names]  # the labels are made when it is their turn
    config = load_config(plan.study.config, words, checks)
    refuse_changed_config(config)
    return config


def _train(plan: PlannedRun, config: Config, overrides: list[str], out: str) -> None:
    """Train a run to its end, unless it is complete."""
    summary = read_summary(config.run.path)
    if summary is None:
        if plan.labels:
            clean = load_config(plan.study.config, [*plan.overrides, *overrides, f"run.dir={out}"])
            make_labels(plan, config, clean, out)
        summary = train_to_end(config)
    if plan.audit and not plan.planted:
        audit_clean_data(plan, config, out)
    figures = ", ".join(f"{name} {value}" for name, value in accuracy_rows(summary["heldout"]))
    console.say(f"complete: {escape(figures)}")
