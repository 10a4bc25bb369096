"""The configuration as JSON Schema, by which editors complete and check a YAML file."""

from __future__ import annotations

from typing import Any

from mhe_dist.config.schema import Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Every key with its type, limits, default and meaning; a key of another kind is refused.

    Rules between sections, such as that workers divide the micro-batches, are not in it.
    """
    schema = Config.model_json_schema()
    return {"$schema": DIALECT, "title": "The YAML of a run of mhe", **_without_titles(schema)}


def _without_titles(schema: Any) -> Any:
    """Pydantic repeats each key's name as its title, which editors would show above the meaning."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _without_titles(value)
        for key, value in schema.items()
        if key != "title" or not isinstance(value, str)
    }
