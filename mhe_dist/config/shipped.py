"""The configurations that come with mhe: the folder `configs` of a checkout, also in the wheel."""

from __future__ import annotations

from pathlib import Path

SCHEMA = "schema.json"
_HOMES = [Path(__file__).parents[1], Path(__file__).parents[2]]  # of an installation, a checkout
FOLDER = next((home / "configs" for home in _HOMES if (home / "configs" / SCHEMA).is_file()), None)


def shipped_configs() -> dict[str, Path]:
    """Name and file of each configuration that comes with mhe, sorted by name."""
    files = FOLDER.glob("*.yaml") if FOLDER else ()
    return {file.stem: file for file in sorted(files)}


def find_config(name: str) -> Path:
    """The file that a path or a name stands for: a local file first, then one that comes with mhe.

    The file need not exist.
    """
    local = Path(name)
    return local if local.is_file() else shipped_configs().get(name, local)
