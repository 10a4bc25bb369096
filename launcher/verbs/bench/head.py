"""`mhe bench head`: what a step of each head costs over the number of classes."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.terminal import console
from launcher.verbs.outputs import usable_folder_here
from mhe_dist.errors import UserError
from mhe_dist.sizes import GIB

if TYPE_CHECKING:
    from pipelines.bench.head import HeadCase, TurnFigures
    from pipelines.bench.head_report import HeadMeasurement, TimesInTurn

DEFAULT_CLASSES = "125_000,1_000_000,4_000_000,8_000_000"
DEFAULT_KINDS = "full,partial_fc,mhs_gather,mhs"


class Memory(str, Enum):
    """Where the rows are stored."""

    DEVICE = "device"
    HOST = "host"
    FILE = "file"


class Dtype(str, Enum):
    """Stored type of the rows."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def head(
    classes: Annotated[
        str, typer.Option(help="Numbers of classes, with commas; 1_000_000 may be written so.")
    ] = DEFAULT_CLASSES,
    kinds: Annotated[
        str, typer.Option(help="Of full, partial_fc, mhs (routed), mhs_gather; with commas.")
    ] = DEFAULT_KINDS,
    memory: Annotated[Memory, typer.Option(help="Where the rows are.")] = Memory.DEVICE,
    dtype: Annotated[Dtype, typer.Option(help="Stored type of the rows.")] = Dtype.FLOAT32,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks; on a GPU each needs one.")] = 2,
    length: Annotated[int, typer.Option(min=1, help="mhs: L, classes of a head.")] = 1000,
    extra_heads: Annotated[int, typer.Option(min=0, help="mhs: m, extra heads per rank.")] = 8,
    labels: Annotated[
        int, typer.Option(min=1, help="Labels of a sample; several are compared with one, in turn.")
    ] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a case at most.")] = 50,
    seconds: Annotated[
        float, typer.Option(min=0, help="No step of a case is begun after this long.")
    ] = 60.0,
    gpu: Annotated[bool, typer.Option("--gpu", help="Compute on GPUs, one for each rank.")] = False,
    out: Annotated[
        str, typer.Option(help="Folder for head.json and head.png.", callback=usable_folder_here)
    ] = "runs/bench",
) -> None:
    """Measure a step of each head: time, memory, traffic, beside the bare matrix products.

    256 samples per rank, embeddings of 128, SGD with momentum. Every step is run twice on the same
    labels. The second run counts; the additional time of the first run is the first touch of its
    rows. Then the numbers of classes take turns, step by step, for the ratios of mhs; with
    --labels, so do samples with several labels and with one. A case that does not fit into the
    memory that is free now is left out and named.

    Example: mhe bench head --kinds partial_fc,mhs --classes 1_000_000,8_000_000
    """
    sizes: dict[str, Any] = {"world_size": world_size, "length": length}
    sizes |= {"extra_heads": extra_heads, "labels": labels}
    bounds = {"steps": steps, "seconds": seconds}
    cases = _cases(kinds, classes, {"memory": memory.value, "dtype": dtype.value} | sizes | bounds)
    _show_measurements(*_measure_cases(cases, gpu), Path(out))


def _cases(kinds: str, classes: str, settings: dict[str, Any]) -> list[HeadCase]:
    from pipelines.bench.head import HeadCase

    chosen = _parse_kinds(kinds)
    return [
        HeadCase(kind, count, **settings) for kind in chosen for count in _parse_classes(classes)
    ]


def _measure_cases(cases: list[HeadCase], gpu: bool) -> tuple[list[HeadMeasurement], TimesInTurn]:
    """Measure the cases that fit into memory, then those that take turns."""
    from pipelines.bench.head import measure_case
    from pipelines.bench.head_report import HeadMeasurement, TimesInTurn

    results = []
    for number, case in enumerate(cases, 1):
        if _fits_in_memory(case):
            with console.status(f"{number} of {len(cases)}: {_case_title(case)}"):
                figures = measure_case(case, gpu)
            console.out.print(f"{_case_title(case)}: {1e3 * figures['step']:,.0f} ms")
            results.append(HeadMeasurement(case, figures))
    if not results:
        raise UserError("--classes: no case fits into the memory that is free")
    plain = not gpu and (cases[0].memory, cases[0].dtype) == ("device", "float32")
    with console.status("mhs, in turn over the classes"):
        mhs, one_label = _measure_in_turn(cases, gpu)
    with console.status("the bare products"):
        bare = _measure_bare_products(cases) if plain else None
    heads = {classes: mhs[classes].heads / one.heads for classes, one in one_label.items()}
    labels = cases[0].labels
    return results, TimesInTurn(_seconds(mhs), bare, _seconds(one_label), labels, heads)


def _seconds(figures: dict[int, TurnFigures]) -> dict[int, float]:
    return {classes: case.seconds for classes, case in figures.items()}


def _show_measurements(results: list[HeadMeasurement], in_turn: TimesInTurn, folder: Path) -> None:
    from pipelines.bench.head_report import (
        measurements_table,
        plot_measurements,
        save_measurements,
        time_ratios,
    )

    folder.mkdir(parents=True, exist_ok=True)
    console.print_table(measurements_table(results))
    console.list_rows("Ratios", time_ratios(results, in_turn))
    save_measurements(results, in_turn, folder / "head.json")
    plot_measurements(results, folder / "head.png")
    files = [("plot", f"{folder}/head.png"), ("figures", f"{folder}/head.json")]
    console.list_rows("Where it is", files)
    options = "--kinds mhs --classes 1_000_000_000 --memory file --dtype bfloat16"
    console.list_next([("a billion classes", ["mhe", "bench", "head", *options.split()])])


def _parse_kinds(kinds: str) -> list[str]:
    from pipelines.bench.head import KINDS

    names = [name.strip() for name in kinds.split(",")]
    for name in names:
        if name not in KINDS:
            raise UserError(f"--kinds {name}: there is {', '.join(KINDS)}")
    return names


def _parse_classes(classes: str) -> list[int]:
    try:
        counts = [int(number) for number in classes.split(",")]
    except ValueError:
        raise UserError(f"--classes {classes}: give numbers like 125_000,1_000_000") from None
    if min(counts) < 1:
        raise UserError(f"--classes {classes}: a number of classes is positive")
    return counts


def _case_title(case: HeadCase) -> str:
    return f"{case.kind}, {case.classes:,} classes"


def _fits_in_memory(case: HeadCase) -> bool:
    from pipelines.bench.head import fit_in_memory

    if fit_in_memory([case]):
        return True
    needed = f"about {case.needed_bytes / GIB:.0f} GiB, more than is free"
    console.say(f"[yellow]left out:[/] {_case_title(case)} needs {needed}")
    return False


def _measure_in_turn(
    cases: list[HeadCase], gpu: bool
) -> tuple[dict[int, TurnFigures], dict[int, TurnFigures]]:
    """Classes -> figures of a routed step, of the largest case and those that fit beside it.

    And the same with one label per sample, if the cases have several.
    """
    from dataclasses import replace

    from pipelines.bench.head import fit_in_memory, measure_in_turn

    chosen: list[HeadCase] = []
    for case in sorted(cases, key=lambda case: -case.classes):
        compared = [case] if case.labels == 1 else [case, replace(case, labels=1)]
        if case.kind == "mhs" and fit_in_memory([*chosen, *compared]):
            chosen += compared
    if len(chosen) < 2:
        return {}, {}
    taken = list(zip(chosen, measure_in_turn(chosen, gpu), strict=True))
    labels = cases[0].labels
    mhs = {case.classes: figures for case, figures in taken if case.labels == labels}
    return mhs, {case.classes: figures for case, figures in taken if case.labels < labels}


def _measure_bare_products(cases: list[HeadCase]) -> dict[str, float] | None:
    """The routed step beside its products, at the smallest C with more heads than samples."""
    from dataclasses import replace

    from pipelines.bench.head import fit_in_memory, measure_bare_products

    fitting = [
        case
        for case in cases
        if case.kind == "mhs" and case.classes > case.batch * case.length and fit_in_memory([case])
    ]
    return (
        measure_bare_products(replace(fitting[0], world_size=1, steps=10, labels=1))
        if fitting
        else None
    )
