"""docs/design.md section 3: arrows point one way, each thing has one owner, rooms fit the eye.

Every import counts: those inside functions and those for type checkers, too.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ("launcher", "pipelines", "mhe_dist")  # an import may go right, never left
# What each room may import of its own floor, from the ground up. A room is a folder below a floor,
# with the folders in it, or a file that stands on the floor alone.
ROOMS: dict[str, dict[str, set[str]]] = {
    "mhe_dist": {
        "errors": set(),
        "seeds": set(),
        "redact": set(),
        "lazy": set(),
        "sizes": set(),
        "limits": set(),
        "disk_room": {"errors"},
        "web_address": set(),
        "storage_errors": set(),
        "storage_retry": {"errors", "storage_errors"},
        "atomic_file": {"storage_retry"},
        "noise": {"seeds"},
        "distributed": {"errors", "sizes", "storage_errors"},
        "config": {"errors", "redact", "sizes", "atomic_file"},
        "checkpoint": {"errors", "storage_errors", "storage_retry", "atomic_file", "distributed"},
        "kernels": {"seeds", "noise"},
        "bank": {
            *("errors", "disk_room", "seeds", "sizes", "noise", "kernels"),
            *("config", "distributed"),
        },
        "backbone": {
            *("errors", "storage_errors", "storage_retry", "atomic_file", "seeds"),
            *("config", "checkpoint", "distributed"),
        },
        "tracking": {"errors", "storage_retry", "atomic_file", "redact", "web_address", "config"},
        "heads": {"errors", "seeds", "sizes", "kernels", "bank", "config", "distributed"},
        "engine": {"errors", "seeds", "sizes", "backbone", "checkpoint", "config", "distributed"},
        "train": {"errors", "seeds", "sizes", "heads", "config", "distributed"},
    },
    "pipelines": {
        "storage": set(),
        "shards": {"storage"},
        "clustering": {"shards", "storage"},
        "data": {"shards", "storage"},
        "runs": {"data", "shards", "storage"},
        "loader": {"data", "shards", "storage"},
        "sources": {"data", "shards", "storage"},
        "embedding": {"sources", "runs", "data", "shards", "storage"},
        "audit": {"clustering", "embedding", "sources", "data", "shards", "storage"},
        "evaluate": {"embedding", "sources", "data", "shards", "storage"},
        "report": {"audit", "evaluate", "embedding", "data", "shards", "storage"},
        "serving": {"data", "shards", "storage"},
        "pretrain": {
            *(
                "serving",
                "report",
                "evaluate",
                "embedding",
                "runs",
                "loader",
                "sources",
                "data",
                "shards",
                "storage",
            ),
        },
        "bench": {
            *("pretrain", "report", "audit", "sources", "runs", "loader", "data", "shards"),
            "storage",
        },
    },
    "launcher": {
        "events": set(),
        "signals": set(),
        "terminal": {"events"},
        "ray_cluster": {"events", "signals"},
        "tasks": {"signals", "terminal", "ray_cluster"},
        "kubernetes": {"ray_cluster"},
        "preflight": {"terminal", "ray_cluster"},
        "reproduce": set(),
        "sweep": {"events", "signals", "ray_cluster"},
        "execute": {"events", "ray_cluster", "preflight"},
        "api": {"signals", "terminal", "ray_cluster", "preflight", "execute"},
        "verbs": {
            *("events", "signals", "terminal", "ray_cluster", "tasks"),
            *("kubernetes", "preflight", "reproduce", "sweep", "execute"),
        },
        "cli": {"terminal", "verbs"},
        "job": {
            *("events", "signals", "terminal", "ray_cluster", "tasks", "preflight", "execute"),
            "cli",
        },
    },
}
ROOM_SIZE = 12  # modules in a folder
# Names that were riddles, of anything that a file defines and of files; clearer ones replaced them.
RETIRED = """
    met meet Ask ask asked place turn Told told expect RowsAhead look golds judge Judged settle
    Code along of_unit_rows View Pass Choice Piece Steady misfits meant config_words heed gently
    undisturbed complain only_ours alike most at_once
"""
RETIRED_FILES = """
    across leveled level_pass stable closed_form canonical average initial stuck mirror mismatch
    view stream fetch slots notes windows foreign inheritance trial cadence keep
"""
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for floor in FLOORS
    for path in sorted((ROOT / floor).rglob("*.py"))
}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def names_in(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Full dotted names of what the import statements among `nodes` name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def everywhere(module: str) -> frozenset[str]:
    """What a module imports anywhere, as full dotted names."""
    return frozenset(names_in(ast.walk(tree_of(MODULES[module]))))


def at_import(module: str) -> set[str]:
    """What a module imports when it is imported: not in functions, not for type checkers."""

    def running(nodes: list[ast.stmt]) -> Iterator[ast.AST]:
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
            yield node
            for block in ("body", "orelse", "finalbody"):
                yield from running(getattr(node, block, []))

    return set(names_in(running(tree_of(MODULES[module]).body)))


def ours(name: str) -> str:
    """The module of ours that a dotted name belongs to; empty for other people's."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


@cache
def arrows(module: str) -> frozenset[str]:
    """Our modules that a module imports. An `__init__` may name what lies in its own folder."""
    found = {ours(name) for name in everywhere(module)} - {"", module}
    return frozenset(name for name in found if not module.startswith(f"{name}."))


def packages(names: set[str] | frozenset[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def importing(*libraries: str) -> set[str]:
    return {module for module in MODULES if packages(everywhere(module)) & set(libraries)}


@pytest.mark.parametrize("module", MODULES)
def test_imports_never_point_upward(module: str) -> None:
    floor = FLOORS.index(module.partition(".")[0])
    assert not packages(arrows(module)) & set(FLOORS[:floor])


def test_the_plan_knows_every_room_and_lists_them_from_the_ground_up() -> None:
    for floor, rooms in ROOMS.items():
        names = {m.split(".")[1] for m in MODULES if m.startswith(f"{floor}.")}
        assert names == set(rooms)
        below: set[str] = set()
        for room, allowed in rooms.items():
            assert allowed <= below, f"{floor}/{room} may import what lies above it"
            below.add(room)


@pytest.mark.parametrize("module", [m for m in MODULES if "." in m])
def test_a_room_imports_only_the_rooms_that_the_plan_allows(module: str) -> None:
    floor, room = module.split(".")[:2]
    beside = {name.split(".")[1] for name in arrows(module) if name.startswith(f"{floor}.")}
    assert beside - {room} <= ROOMS[floor][room]


def imports_of_imports(module: str) -> set[str]:
    """Our modules that a module imports, and those that they import, and so on."""
    found: set[str] = set()
    left = [module]
    while left:
        new = arrows(left.pop()) - found
        found |= new
        left.extend(new)
    return found


def test_there_is_no_import_circle() -> None:
    members = {module for module in MODULES if module in imports_of_imports(module)}
    circles = {module: sorted(arrows(module) & members) for module in sorted(members)}
    assert circles == {}, "each of these imports itself through the others that it names"


def test_no_room_holds_more_modules_than_the_eye_takes_in() -> None:
    sizes = Counter(path.parent for path in MODULES.values() if path.name != "__init__.py")
    assert {path: size for path, size in sizes.items() if size > ROOM_SIZE} == {}


@pytest.mark.parametrize("module", [m for m, p in MODULES.items() if p.name == "__init__.py"])
def test_every_room_says_what_it_knows_and_what_it_exports(module: str) -> None:
    tree = tree_of(MODULES[module])
    assert ast.get_docstring(tree)
    targets = [t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    assert len(tree.body) == 1 or "__all__" in names


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("launcher")])
def test_the_launcher_imports_no_torch_and_no_ray_at_module_level(module: str) -> None:
    assert not packages(at_import(module)) & {"torch", "deepspeed", "ray"}


def test_only_the_launcher_knows_ray() -> None:
    assert packages(importing("ray")) == {"launcher"}


def test_only_the_adapter_knows_what_ray_keeps_private() -> None:
    private = {
        module
        for module in importing("ray")
        for name in everywhere(module)
        if name.startswith("ray.") and any(part.startswith("_") for part in name.split("."))
    }
    assert private == {"launcher.ray_cluster.ray_internals"}


def test_the_training_library_knows_no_tar_files() -> None:
    assert not {m for m in importing("tarfile", "webdataset") if m.startswith("mhe_dist")}


def test_only_the_engine_imports_deepspeed() -> None:
    assert importing("deepspeed") == {"mhe_dist.engine.deepspeed_import"}


def test_only_the_topology_creates_process_groups() -> None:
    creating = {"new_group", "init_process_group", "init_device_mesh", "new_subgroups"}
    using = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in creating
    }
    assert using == {"mhe_dist.distributed.topology"}


@pytest.mark.parametrize("module", ["backbone.model", "heads.margins", "bank.class_layout"])
def test_model_code_knows_nothing_of_ranks(module: str) -> None:
    names = everywhere(f"mhe_dist.{module}")
    assert not {n for n in names if n.startswith(("torch.distributed", "mhe_dist.distributed"))}


def test_the_config_needs_no_torch() -> None:
    rooms = ("mhe_dist.config", "mhe_dist.errors", "mhe_dist.redact")
    assert not {m for m in importing("torch") if m.startswith(rooms)}


def test_the_loop_fits_the_eye() -> None:
    assert len(MODULES["mhe_dist.train.loop"].read_text().splitlines()) <= 250


def names_given(tree: ast.Module) -> Iterator[str]:
    """Names of the classes, functions, arguments, variables and attributes that a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname


def test_retired_names_stay_retired() -> None:
    """In the tests, too. What one underscore makes private counts without it."""
    files = [path for part in (*FLOORS, "tests") for path in (ROOT / part).rglob("*.py")]
    retired, retired_files = set(RETIRED.split()), set(RETIRED_FILES.split())
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in names_given(tree_of(path))
        if name.removeprefix("_") in retired
    }
    assert found == set()
    assert not {m for m in MODULES if m.rpartition(".")[2] in retired_files}


def test_one_name_is_one_class() -> None:
    classes = Counter(
        node.name
        for path in MODULES.values()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in classes.items() if count > 1] == []
