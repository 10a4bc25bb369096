"""Writes comparisons of runs as a page of Markdown with tables and plots."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePath
from typing import NamedTuple

from mhe_dist.errors import UserError
from pipelines.report.comparison import RECOGNITION, Claim, Measure, Spread, VariantResult
from pipelines.report.comparison_plot import draw_comparison
from pipelines.report.figures import save_figure
from pipelines.storage.urls import atomic_write

_TOP = """# Results

Written by `mhe reproduce`, not by hand: its next call replaces a section, unless it has fewer
complete runs than the section here.

- rank-1: share of the probes whose own class is the nearest in the gallery.
- TAR: share of the pairs of one class that score above the threshold which at most 1 in 10,000
  pairs of two classes exceed (FAR 1e-4); pairs of a probe and a gallery entry. Both figures are in
  percent: mean over the seeds (lowest to highest).
- top-1 of the training's classes: share of other images of these classes whose best class of all,
  by the head, is their own.
- P@k and PSP@k, of several labels per image: docs/evaluation.md.
- classes seen: number of classes in the softmax of a sample, mean over the run.
- head, ms: time that a step spends in the head, median over the run. images/s: of all workers
  together, while training. memory: of the largest worker process, libraries included. minutes: of
  training; steps that an interruption lost are not counted. Times can be compared only on one kind
  of device, and if the machine had nothing else to do during any of the runs; this is not checked.
"""


_FIGURES_HEAD = "| head | seeds |"
_WRITTEN_BY = "Written by `mhe reproduce`"


@dataclass(frozen=True)
class ComparisonSection:
    """One comparison on the page.

    Attributes:
        name: of the study; the plot is named by it, too.
        title: heading.
        text: what is compared on what.
        command: makes the comparison.
        results: a row each.
        typefaces: (name in the metrics, title on the page); none: all probes together.
        measures: what is compared on each of them.
        claims: to be checked.
        more: lines below the figures.
    """

    name: str
    title: str
    text: str
    command: str
    results: Sequence[VariantResult]
    typefaces: Sequence[tuple[str, str]] = ()
    measures: Sequence[Measure] = RECOGNITION
    claims: Sequence[Claim] = ()
    more: Sequence[str] = ()

    @property
    def columns(self) -> Sequence[tuple[str, str]]:
        """The groups of probes: (name in the metrics, title)."""
        return self.typefaces or [("", "unseen typefaces")]


class WrittenPage(NamedTuple):
    """What was written.

    Attributes:
        files: paths of the page and of the plots that were drawn.
        kept: titles of the sections that stay as they were, since they hold more complete runs.
    """

    files: list[str]
    kept: list[str]


def write_comparison_page(
    sections: Sequence[ComparisonSection], page: str, existing: str = ""
) -> WrittenPage:
    """Write the page, and beside it a plot for every section that has a complete run.

    A section of the existing page stays, with its plot, if it has more complete runs than the new
    one of that title, or if there is no new one.

    Args:
        sections: in their order.
        page: path or URL of the Markdown file.
        existing: its text before; empty: there is none.

    Raises:
        UserError: the existing text is no such page, and would be lost.
    """
    if existing.strip() and _WRITTEN_BY not in existing:
        raise UserError(
            f"--page {page}: is no page that mhe reproduce wrote, and stays as it is; give the "
            "name of another file, such as results.md"
        )
    before = _split_sections(existing)
    written = WrittenPage([page], [])
    blocks = [_TOP]
    stem = str(PurePath(page).with_suffix("")) if "://" not in page else page.removesuffix(".md")
    for section in sections:
        old = before.pop(section.title, "")
        if _count_runs(old) > sum(len(each.outcomes) for each in section.results):
            blocks.append(old)
            written.kept.append(section.title)
            continue
        picture = ""
        if any(each.outcomes for each in section.results):
            picture = f"{stem}-{section.name}.png"
            save_figure(
                draw_comparison(section.results, section.columns, section.measures), picture
            )
            written.files.append(picture)
        blocks.append("\n".join(_section_lines(section, Path(picture).name)))
    with atomic_write(page) as stream:
        stream.write("\n".join([*blocks, *before.values()]).encode())
    return written


def _split_sections(text: str) -> dict[str, str]:
    """The sections of a written page, by their titles."""
    blocks = re.split(r"(?m)^(?=## )", text)[1:]
    return {block.partition("\n")[0].removeprefix("## "): block.rstrip() + "\n" for block in blocks}


def _count_runs(section: str) -> int:
    """Number of complete runs in the table of figures of a written section."""
    lines = section.splitlines()
    heads = [number for number, line in enumerate(lines) if line.startswith(_FIGURES_HEAD)]
    rows = takewhile(lambda line: line.startswith("|"), lines[heads[0] + 2 :] if heads else [])
    return sum(int(row.split("|")[2]) for row in rows)


def _section_lines(section: ComparisonSection, picture: str) -> Iterator[str]:
    yield f"## {section.title}\n"
    yield f"    {section.command}\n"
    yield f"{section.text}\n"
    complete = [each for each in section.results if each.outcomes]
    if complete:
        yield f"{_sizes(section, complete[0])}\n"
        yield from _table(section, complete)
        yield f"\n![{section.title}]({picture})\n"
        if guesses := list(_guesses(section, complete)):
            yield "\n".join([*guesses, ""])
    if section.claims and complete:
        verdicts = (claim.verdict(section.results) for claim in section.claims)
        yield from (f"- {sentence}" for sentences in verdicts for sentence in sentences)
        yield ""
    if section.more:
        yield from section.more
        yield ""
    missing = [each.unfinished for each in section.results if each.missing]
    if missing:
        yield f"Not complete: {'; '.join(missing)}.\n"


def _sizes(section: ComparisonSection, first: VariantResult) -> str:
    """How many images were evaluated."""
    is_search = RECOGNITION[0] in section.measures
    counted = "probes" if is_search else "samples"
    sizes = ", ".join(
        f"{first.values(counted, name)[0]:,.0f} ({title})" for name, title in section.columns
    )
    if not is_search:
        return f"Images: {sizes}."
    return f"Probes: {sizes}, against {first.values('gallery')[0]:,.0f} enrolled."


def _guesses(section: ComparisonSection, complete: Sequence[VariantResult]) -> Iterator[str]:
    """How far each variant is above a guess that looks at no image, in its worst seed."""
    for name, _ in section.columns:
        for measure in (each for each in section.measures if each.guess):
            gains = [
                f"{each.title} {100 * min(each.gains(measure, name)):+.2f}" for each in complete
            ]
            reached = _percent(complete[0].spread(measure.guess, name))
            yield (
                f"- {measure.title}: the most frequent classes of the training reach {reached} "
                f"for every image. Points above that, worst seed: {', '.join(gains)}."
            )


def _table(section: ComparisonSection, complete: Sequence[VariantResult]) -> Iterator[str]:
    """The table of figures, then the table of costs."""
    cells = [f"{title}: {each.title}" for _, title in section.columns for each in section.measures]
    yield from _rows(
        ["head", "seeds", "classes seen", *cells], [_reached(section, each) for each in complete]
    )
    yield ""
    yield from _cost_table(complete)


def _cost_table(complete: Sequence[VariantResult]) -> Iterator[str]:
    """What the runs cost: a row for each variant, and for each of its devices if one is known."""
    costs = ["head, ms", "images/s", "memory, GiB", "steps", "epochs", "minutes"]
    if not any(outcome.device for each in complete for outcome in each.outcomes):
        yield from _rows(["head", *costs], [[each.title, *_cost(each)] for each in complete])
        return
    rows = [
        [each.title, device or "not recorded", *_cost(part)]
        for each in complete
        for device, part in each.by_device().items()
    ]
    yield from _rows(["head", "device", *costs], rows)


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _reached(section: ComparisonSection, each: VariantResult) -> list[str]:
    cells = [
        _percent(each.spread(measure.metric, name))
        for name, _ in section.columns
        for measure in section.measures
    ]
    return [each.title, str(len(each.outcomes)), f"{each.mean('classes_seen'):,.0f}", *cells]


def _cost(each: VariantResult) -> list[str]:
    return [
        f"{1000 * each.mean('head_s'):.1f}",
        f"{each.mean('images_per_s'):,.0f}",
        f"{each.mean('memory_gib'):.2f}",
        f"{each.mean('steps'):,.0f}",
        f"{each.mean('epochs'):.1f}",
        f"{each.mean('train_s') / 60:.1f}",
    ]


def _percent(spread: Spread) -> str:
    mean, low, high = (f"{100 * value:.2f}" for value in spread)
    return mean if low == high else f"{mean} ({low} to {high})"
