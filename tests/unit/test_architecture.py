"""DESIGN section 3: arrows point one way, each thing has one owner, the loop fits the eye."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("launcher", "benchmarks", "pipelines", "mhe_dist")  # an import may go right, never left
BOTTOM = (
    "config",
    "config_data",
    "config_head",
    "config_section",
    "labels",
    "margins",
    "schedule",
    "seeds",
    "retention",
)
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Full names of what import statements among `nodes` name; of ours, the module itself."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in NAMES else str(node.module)


def everywhere(path: Path) -> set[str]:
    return set(imported(ast.walk(tree_of(path))))


def at_import(path: Path) -> set[str]:
    """What the module imports when it is imported: not in functions, not for type checkers."""

    def running(nodes: list[ast.stmt]) -> Iterator[ast.AST]:
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
            yield node
            for block in ("body", "orelse", "finalbody"):
                yield from running(getattr(node, block, []))

    return set(imported(running(tree_of(path).body)))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_never_point_upward(path: Path) -> None:
    rank = PACKAGES.index(name_of(path).partition(".")[0])
    heads = {name.partition(".")[0] for name in everywhere(path)}
    assert not heads & set(PACKAGES[:rank])


def test_there_is_no_import_cycle() -> None:
    arrows = {name_of(path): at_import(path) & NAMES for path in MODULES}
    free: set[str] = set()
    while ready := {name for name in arrows if name not in free and not arrows[name] - free}:
        free |= ready
    assert not set(arrows) - free, "these import one another"


@pytest.mark.parametrize("path", [p for p in MODULES if "launcher" in p.parts], ids=name_of)
def test_the_launcher_imports_no_torch_and_no_ray_at_module_level(path: Path) -> None:
    assert not {name.partition(".")[0] for name in at_import(path)} & {"torch", "deepspeed", "ray"}


def test_only_the_launcher_knows_ray() -> None:
    knowing = {name_of(p) for p in MODULES if "ray" in {n.partition(".")[0] for n in everywhere(p)}}
    assert {name.partition(".")[0] for name in knowing} == {"launcher"}


def test_the_training_library_knows_no_tar_files() -> None:
    ours = [path for path in MODULES if "mhe_dist" in path.parts]
    assert not [p for p in ours if everywhere(p) & {"tarfile", "webdataset"}]


def test_only_the_engine_imports_deepspeed() -> None:
    using = {
        name_of(path)
        for path in MODULES
        if "deepspeed" in {name.partition(".")[0] for name in everywhere(path)}
    }
    assert using == {"mhe_dist.engine.engine"}


def test_only_the_topology_creates_process_groups() -> None:
    creating = {"new_group", "init_process_group", "init_device_mesh", "new_subgroups"}
    using = {
        name_of(path)
        for path in MODULES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in creating
    }
    assert using == {"mhe_dist.distributed.topology"}


@pytest.mark.parametrize("module", ["backbone", "margins", "labels"])
def test_model_code_knows_nothing_of_ranks(module: str) -> None:
    names = everywhere(ROOT / "mhe_dist" / f"{module}.py")
    assert not {
        n for n in names if n.startswith(("torch.distributed", "mhe_dist.distributed.topology"))
    }


@pytest.mark.parametrize("module", BOTTOM)
def test_the_bottom_of_the_library_stands_on_nothing_above_it(module: str) -> None:
    ours = {n for n in at_import(ROOT / "mhe_dist" / f"{module}.py") if n.startswith("mhe_dist")}
    assert ours <= {"mhe_dist.errors", *(f"mhe_dist.{name}" for name in BOTTOM)}


def test_the_loop_fits_the_eye() -> None:
    assert len((ROOT / "mhe_dist" / "train.py").read_text().splitlines()) <= 300


def test_every_package_is_installed() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name_of(path.parent / "__init__.py") for path in MODULES}
    assert set(settings["tool"]["setuptools"]["packages"]) == packages
