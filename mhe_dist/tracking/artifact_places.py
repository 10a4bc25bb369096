"""Where a local MLflow database says that files are, after its folder was copied or moved.

MLflow stores whole paths, of the experiment and of each run and model, and has no call that changes
them: pictures and models of a copied folder would be looked for where the folder was.
"""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

logger = logging.getLogger(__name__)

_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
_WAIT_S = 10.0  # for a server that is writing


def follow_artifacts(database: Path, folder: Path) -> int:
    """Let the database find the artifacts in `folder`, if it was copied or moved there with it.

    Args:
        database: SQLite file of MLflow.
        folder: where artifacts of its experiments are by now, under the name that they had.

    Returns:
        Number of runs that have another place now.
    """
    if not database.exists() or not folder.is_dir():
        return 0
    new = folder.absolute().as_uri()
    try:
        with closing(sqlite3.connect(database, timeout=_WAIT_S)) as connection, connection:
            moved = [old for old in _places(connection) if old != new and _was_here(old, folder)]
            return sum(_replace(connection, old, new) for old in moved)
    except sqlite3.Error as error:  # no tables yet, or of another version: then MLflow says so
        logger.warning("%s: the places of its artifacts stay as they are: %s", database, error)
        return 0


def _places(connection: sqlite3.Connection) -> list[str]:
    """What experiments have for their artifacts, each once; none before MLflow has made tables."""
    exists = "SELECT 1 FROM sqlite_master WHERE name = 'experiments'"
    if not connection.execute(exists).fetchone():
        return []
    found = connection.execute("SELECT DISTINCT artifact_location FROM experiments")
    return [url for (url,) in found if url and url.startswith("file:")]


def _was_here(url: str, folder: Path) -> bool:
    """Whether this is where the folder was: of its name, and gone, or with runs that are here."""
    path = Path(unquote(urlsplit(url).path))
    if path.name != folder.name:
        return False
    return not path.is_dir() or any((path / run.name).is_dir() for run in folder.iterdir())


def _replace(connection: sqlite3.Connection, old: str, new: str) -> int:
    """Give everything in one place another one; the number of runs."""
    runs = 0
    for table, column in _COLUMNS:
        done = connection.execute(
            f"UPDATE {table} SET {column} = :new || substr({column}, :length) "
            f"WHERE {column} = :old OR substr({column}, 1, :length) = :old || '/'",
            {"new": new, "old": old, "length": len(old) + 1},
        )
        runs += done.rowcount if table == "runs" else 0
    return runs
