"""What travels with a job: the code of mhe and the resolved settings of the run, nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mhe_dist.config.schema import Config
from mhe_dist.config.section import ConfigSection, has_variable, path_keys
from mhe_dist.config.shipped import FOLDER
from mhe_dist.config.write import config_to_yaml
from mhe_dist.errors import UserError
from pipelines.runs.folder import absolute_path

PACKAGES = ("launcher", "mhe_dist", "pipelines")
SETTINGS_FILE = "run.yaml"
_SUFFIXES = (".py", ".j2", ".css", ".js")  # setup.py puts the same into the wheel
_SQLITE = re.compile(r"sqlite(\+\w+)?:///")  # with a driver or without


@dataclass(frozen=True)
class CodePackage:
    """A folder that is sent.

    Attributes:
        folder: where it lies until it is sent.
        files: paths in it, sorted.
        bytes: their size.
    """

    folder: Path
    files: list[str]
    bytes: int

    @staticmethod
    def of(folder: Path) -> CodePackage:
        """What lies in a folder."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files]
        return CodePackage(folder, names, sum(path.stat().st_size for path in files))


def build_package(config: Config, folder: Path) -> CodePackage:
    """Copy the code that runs here and the settings into an empty folder; see `copy_code`.

    Args:
        config: of the run; see `portable`.
        folder: an empty folder.
    """
    copy_code(folder)
    (folder / SETTINGS_FILE).write_text(config_to_yaml(config), encoding="utf-8")
    return CodePackage.of(folder)


def copy_code(folder: Path) -> None:
    """Copy the code that runs here, and what it reads, into an empty folder.

    A list of what is sent, not of what is left out: data, runs, environments and whatever else lies
    beside the code stay where they are. It works from a checkout and from an installed wheel.
    """
    root = Path(__file__).parents[2]
    for package in PACKAGES:
        for source in _sources(root / package):
            target = folder / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    if FOLDER:
        shutil.copytree(FOLDER, folder / "mhe_dist" / FOLDER.name, dirs_exist_ok=True)


def with_absolute_paths(config: Config) -> Config:
    """A copy whose local paths hold in any working directory.

    They mean the same file system on every node: a laptop's own, or one that all nodes mount.

    Raises:
        UserError: the working directory has a `$` in its name, which a config takes for a variable.
    """
    return map_paths(config, _absolute)


def _absolute(key: str, path: str) -> str:
    found = absolute_path(path)
    if has_variable(found):
        raise UserError(
            f"{key}={found}: `$` in the name of a folder stands for a variable in a config; call "
            "the folder otherwise, or work in a link to it"
        )
    return found


def map_paths(config: Config, change: Callable[[str, str], str]) -> Config:
    """A copy in which every path and URL is changed.

    Args:
        config: of the run.
        change: is given a dotted key and its path, and returns the new path; keys without a value
            are left out. Of `tracking.uri` it is given a path only: the file of an SQLite store.
    """
    copy = config.model_copy(deep=True)
    _map_section(copy, "", change)
    if match := _SQLITE.match(copy.tracking.uri):
        file = copy.tracking.uri[match.end() :]
        copy.tracking.uri = f"{match[0]}{change('tracking.uri', file)}"
    return copy


def _map_section(section: ConfigSection, prefix: str, change: Callable[[str, str], str]) -> None:
    """Change the paths of a section and of those inside it; the schema says which keys are paths.

    Args:
        section: is changed.
        prefix: of its dotted keys.
        change: see `map_paths`.
    """
    paths = path_keys(type(section))
    for name, value in section:
        key = f"{prefix}{name}"
        if name in paths and isinstance(value, list):
            setattr(section, name, [change(key, path) for path in value])
        elif name in paths and value:
            setattr(section, name, change(key, value))
        elif isinstance(value, ConfigSection):
            _map_section(value, f"{key}.", change)
        elif isinstance(value, list):
            for number, entry in enumerate(value):
                if isinstance(entry, ConfigSection):
                    _map_section(entry, f"{key}.{number}.", change)


def _sources(package: Path) -> Iterator[Path]:
    """The code of a package, and what pages are made of beside it."""
    for path in sorted(package.rglob("*")):
        if path.suffix in _SUFFIXES and "__pycache__" not in path.parts:
            yield path
