"""`mhe bench head`: what a step of each head costs over the number of classes."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.terminal import console
from mhe_dist.errors import UserError

if TYPE_CHECKING:
    from pipelines.bench.head import Case
    from pipelines.bench.head_report import Result, Turns

CLASSES = "125_000,1_000_000,4_000_000,8_000_000"
KINDS = "full,partial_fc,mhs_gather,mhs"


class Memory(str, Enum):
    """Where the rows are."""

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
    ] = CLASSES,
    kinds: Annotated[
        str, typer.Option(help="Of full, partial_fc, mhs (routed), mhs_gather; with commas.")
    ] = KINDS,
    memory: Annotated[Memory, typer.Option(help="Where the rows are.")] = Memory.DEVICE,
    dtype: Annotated[Dtype, typer.Option(help="Stored type of the rows.")] = Dtype.FLOAT32,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks; on a GPU each needs one.")] = 2,
    length: Annotated[int, typer.Option(min=1, help="mhs: L, classes of a head.")] = 1000,
    extra_heads: Annotated[int, typer.Option(min=0, help="mhs: m, extra heads per rank.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a case at most.")] = 50,
    seconds: Annotated[
        float, typer.Option(min=0, help="No step of a case is begun after this long.")
    ] = 60.0,
    out: Annotated[str, typer.Option(help="Folder for head.json and head.png.")] = "runs/bench",
) -> None:
    """Measure a step of each head: time, memory, traffic, beside the bare matrix products.

    256 samples per rank, embeddings of 128, SGD with momentum. Every step is run twice on the same
    labels; the second time counts, what the first one took longer is the first touch of its rows.
    Then the numbers of classes take turns, step by step, for the ratios of mhs. A case that does
    not fit in the memory that is free now is left out, by name.

    Example: mhe bench head --kinds partial_fc,mhs --classes 1_000_000,8_000_000
    """
    sizes = {"world_size": world_size, "length": length, "extra_heads": extra_heads}
    bounds = {"steps": steps, "seconds": seconds}
    cases = _cases(kinds, classes, {"memory": memory.value, "dtype": dtype.value} | sizes | bounds)
    _show(*_measure(cases), Path(out))


def _cases(kinds: str, classes: str, settings: dict[str, Any]) -> list[Case]:
    from pipelines.bench.head import KINDS as KNOWN
    from pipelines.bench.head import Case

    chosen = _names(kinds, KNOWN)
    return [Case(kind, count, **settings) for kind in chosen for count in _counts(classes)]


def _measure(cases: list[Case]) -> tuple[list[Result], Turns]:
    """The cases that fit, and what is measured in turn."""
    from pipelines.bench import head as bench
    from pipelines.bench.head_report import Result, Turns

    device, results = _device(), []
    for number, case in enumerate(cases, 1):
        if _fits(case):
            with console.out.status(f"{number} of {len(cases)}: {_title(case)}"):
                figures = bench.run(case, device)
            console.out.print(f"{_title(case)}: {1e3 * figures['step']:,.0f} ms")
            results.append(Result(case, figures))
    if not results:
        raise UserError("--classes: no case fits into the memory that is free")
    plain = device == "cpu" and (cases[0].memory, cases[0].dtype) == ("device", "float32")
    with console.out.status("mhs, in turn over the classes"):
        mhs = _in_turn(cases, device)
    with console.out.status("the bare products"):
        return results, Turns(mhs, _bare(cases) if plain else None)


def _show(results: list[Result], turns: Turns, folder: Path) -> None:
    from pipelines.bench import head_report as report

    folder.mkdir(parents=True, exist_ok=True)
    console.out.print(report.table(results))
    console.list_commands("Ratios", report.ratios(results, turns))
    report.save(results, turns, folder / "head.json")
    report.plot(results, folder / "head.png")
    places = [("plot", f"{folder}/head.png"), ("figures", f"{folder}/head.json")]
    console.list_commands("Where it is", places)
    larger = "mhe bench head --kinds mhs --classes 1_000_000_000 --memory file --dtype bfloat16"
    console.list_commands("Next", [("a billion classes", larger)])


def _device() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "cpu"


def _names(kinds: str, known: dict[str, dict[str, object]]) -> list[str]:
    names = [name.strip() for name in kinds.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"--kinds {name}: there is {', '.join(known)}")
    return names


def _counts(classes: str) -> list[int]:
    try:
        counts = [int(number) for number in classes.split(",")]
    except ValueError:
        raise UserError(f"--classes {classes}: give numbers like 125_000,1_000_000") from None
    if min(counts) < 1:
        raise UserError(f"--classes {classes}: a number of classes is positive")
    return counts


def _title(case: Case) -> str:
    return f"{case.kind}, {case.classes:,} classes"


def _fits(case: Case) -> bool:
    from pipelines.bench.head import fit

    if fit([case]):
        return True
    console.say(
        f"[yellow]left out:[/] {_title(case)} needs about {case.needed_bytes / 2**30:.0f} GiB, "
        "more than is free"
    )
    return False


def _in_turn(cases: list[Case], device: str | None) -> dict[int, float]:
    """Seconds of a routed step by classes: the most, and those that fit in memory beside them."""
    from pipelines.bench.head import fit, run_in_turn

    chosen: list[Case] = []
    for case in sorted(cases, key=lambda case: -case.classes):
        if case.kind == "mhs" and fit([*chosen, case]):
            chosen.append(case)
    if len(chosen) < 2:
        return {}
    seconds = run_in_turn(chosen, device)
    return {case.classes: taken for case, taken in zip(chosen, seconds, strict=True)}


def _bare(cases: list[Case]) -> dict[str, float] | None:
    """The routed step beside its products, at the smallest C with more heads than samples."""
    from dataclasses import replace

    from pipelines.bench.head import fit, run_bare

    fitting = [
        case
        for case in cases
        if case.kind == "mhs" and case.classes > case.batch * case.length and fit([case])
    ]
    return run_bare(replace(fitting[0], world_size=1, steps=10)) if fitting else None
