"""Comparisons as a page of Markdown with tables and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from pipelines.report import comparison_plot
from pipelines.report import figures as pictures
from pipelines.report.comparison import RANK1, TAR, Claim, Compared, Spread
from pipelines.storage.urls import atomic_write

_TOP = """# Results

Written by `mhe reproduce`, not by hand: its next call replaces it.

- rank-1: share of the probes whose own class is the nearest in the gallery.
- TAR: share of the right gallery-probe pairs above the threshold that at most 1 in 10,000 wrong
  pairs exceeds (FAR 1e-4). Both in percent: mean over the seeds (lowest to highest).
- classes seen: in the softmax of a sample, mean over the run.
- head, ms: time of a step in the head, median over the run. images/s: of all workers together,
  while training. memory: largest of a worker process, libraries included. minutes: of training,
  since the last resume where a run was interrupted. Times compare only where the machine had
  nothing else to do in any of the runs, which nobody checks.
"""


@dataclass(frozen=True)
class Part:
    """One comparison on the page.

    Attributes:
        name: of the study; names the picture too.
        title: heading.
        text: what is compared on what.
        command: what makes it.
        compared: a row each.
        typefaces: (name in the metrics, what the page calls it); none: all probes together.
        claim: to be judged.
    """

    name: str
    title: str
    text: str
    command: str
    compared: Sequence[Compared]
    typefaces: Sequence[tuple[str, str]] = ()
    claim: Claim | None = None

    @property
    def columns(self) -> Sequence[tuple[str, str]]:
        """The groups of probes that figures are given for."""
        return self.typefaces or [("", "unseen typefaces")]


def write(parts: Sequence[Part], page: str) -> list[str]:
    """Write the page, and beside it a picture for every part that has something to show.

    Args:
        parts: in their order.
        page: path or URL of the Markdown file; what is there is replaced.

    Returns:
        Paths of the files.
    """
    written, sections = [page], [_TOP]
    stem = str(PurePath(page).with_suffix("")) if "://" not in page else page.removesuffix(".md")
    for part in parts:
        picture = ""
        if any(each.outcomes for each in part.compared):
            picture = f"{stem}-{part.name}.png"
            pictures.save(comparison_plot.draw(part.compared, part.columns), picture)
            written.append(picture)
        sections.append("\n".join(_section(part, Path(picture).name)))
    with atomic_write(page) as stream:
        stream.write("\n".join(sections).encode())
    return written


def _section(part: Part, picture: str) -> Iterator[str]:
    yield f"## {part.title}\n"
    yield f"    {part.command}\n"
    yield f"{part.text}\n"
    complete = [each for each in part.compared if each.outcomes]
    if complete:
        first = complete[0]
        probes = [(int(first.values("probes", name)[0]), title) for name, title in part.columns]
        sizes = ", ".join(f"{count:,} ({title})" for count, title in probes)
        yield f"Probes: {sizes}, against {int(first.values('gallery')[0]):,} enrolled.\n"
        yield from _table(part, complete)
        yield f"\n![{part.title}]({picture})\n"
    if part.claim and complete:
        yield from (f"- {sentence}" for sentence in part.claim.judge(part.compared))
        yield ""
    missing = [each.unfinished for each in part.compared if each.missing]
    if missing:
        yield f"Not complete: {'; '.join(missing)}.\n"


def _table(part: Part, complete: Sequence[Compared]) -> Iterator[str]:
    """What was reached, then what it cost."""
    figures = [f"{title}: {figure}" for _, title in part.columns for figure in ("rank-1", "TAR")]
    yield from _rows(
        ["head", "seeds", "classes seen", *figures], [_reached(part, each) for each in complete]
    )
    yield ""
    costs = ["head", "head, ms", "images/s", "memory, GiB", "steps", "epochs", "minutes"]
    yield from _rows(costs, [_cost(each) for each in complete])


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _reached(part: Part, each: Compared) -> list[str]:
    figures = [
        _percent(each.spread(metric, name)) for name, _ in part.columns for metric in (RANK1, TAR)
    ]
    return [each.title, str(len(each.outcomes)), f"{each.mean('classes_seen'):,.0f}", *figures]


def _cost(each: Compared) -> list[str]:
    return [
        each.title,
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
