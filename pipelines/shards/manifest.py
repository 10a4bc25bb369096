"""The JSON file that makes a folder a data set or a label set."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

from mhe_dist.errors import UserError
from mhe_dist.storage_retry import with_retries
from pipelines.storage.unusable_path import explain_fault
from pipelines.storage.urls import resolve_url


def read_manifest(
    folder: str,
    file: str,
    formats: Collection[str],
    *,
    missing: Callable[[], str],
    foreign: str,
    again: str,
) -> dict[str, Any]:
    """The content of a folder's manifest, of a format that is known.

    Args:
        folder: path or URL.
        file: name of the manifest in it.
        formats: that its key `format` may name.
        missing: says what is said of a folder without one, which may need a look into it.
        foreign: what is said of a file of another format.
        again: the cure of one that is damaged.

    Raises:
        UserError: it is missing, cannot be read, is no JSON, or of another format.
    """
    filesystem, path = resolve_url(f"{folder}/{file}")
    try:
        content = json.loads(with_retries(lambda: filesystem.cat_file(path), folder))
    except FileNotFoundError:
        raise UserError(f"{folder}: {missing()}") from None
    except OSError as error:
        raise UserError(f"{folder}/{file}: cannot be read: {explain_fault(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder}/{file}: not JSON ({error}); {again}") from None
    if not isinstance(content, dict) or content.get("format") not in formats:
        raise UserError(f"{folder}/{file}: {foreign}")
    return content
