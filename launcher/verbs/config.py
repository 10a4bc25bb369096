"""`mhe config`: every key of a run, its value, its meaning, and what is not at its default."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
import yaml
from pydantic_core import to_jsonable_python
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from launcher.terminal import console
from launcher.verbs.options import CONFIG, Overrides
from mhe_dist.config.auto.head_sizes import auto_keys
from mhe_dist.config.describe import ConfigEntry, describe_config
from mhe_dist.config.json_schema import json_schema
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config
from mhe_dist.config.write import config_to_dict
from mhe_dist.errors import RunError, UserError

REQUIRED = "(required)"  # what `describe_config` gives where there is no default


def show(
    config: Annotated[str | None, CONFIG] = None,
    overrides: Overrides = None,
    as_yaml: Annotated[
        bool | None,
        typer.Option(
            "--yaml/--table",
            help="YAML that can be run again, or a table with meanings; by default YAML if the "
            "output goes to a file.",
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of all settings, for editors.")
    ] = False,
) -> None:
    """Show every setting of a run, with its meaning; those that are not the default stand out.

    Beside each key stands what it may hold. Where the data are at hand, a line says which numbers
    the `auto` sizes of the head become, and why.

    Example: mhe config quickstart optim.lr=0.4

    Example: mhe config quickstart > mine.yaml
    """
    if schema:
        if config is not None:
            raise typer.BadParameter(
                "the schema is that of every run: give no file or setting with it",
                param_hint="--schema",
            )
        sys.stdout.write(f"{json.dumps(json_schema(), indent=2)}\n")
        return
    if config is None:
        raise typer.BadParameter("give a YAML file or a name", param_hint="CONFIG")
    resolved = load_config(config, overrides or [])
    sizes = explain_auto(resolved)
    if not sys.stdout.isatty() if as_yaml is None else as_yaml:
        _print_yaml(f"# {sizes}\n" if sizes else "")
        _print_yaml(yaml.safe_dump(config_to_dict(resolved), sort_keys=False, allow_unicode=True))
        return
    entries = describe_config(resolved)
    console.print_table(_table(entries))
    changed = sum(_is_changed(entry) for entry in entries)
    if sizes:
        console.say(escape(sizes))
    console.say(f"{len(entries)} keys, {changed} of them (bold) not at their default.")
    words = [config, *(overrides or [])]
    console.list_next(
        [("run it", ["mhe", "train", *words]), ("as YAML", ["mhe", "config", *words, "--yaml"])]
    )


def explain_auto(config: Config) -> str:
    """In a line, what the `auto` sizes of the head become, and why; empty if none is `auto`."""
    from pipelines.runs.auto_sizes import explain_settled
    from pipelines.shards.index import index_exists

    keys = auto_keys(config.head)
    if not keys:
        return ""
    try:
        if index_exists(config.data.shards):
            return explain_settled(config)
    except (UserError, RunError, ImportError, ValueError, OSError):
        pass  # `mhe preflight` says what is wrong with the data
    return f"auto: {', '.join(keys)} become numbers when the classes of data.shards are known"


def _print_yaml(text: str) -> None:
    """Print YAML, in colours where there are any, and never wrapped."""
    if console.out.is_terminal:
        console.out.print(Syntax(text.rstrip(), "yaml", background_color="default"))
    else:
        sys.stdout.write(text)


def _table(entries: list[ConfigEntry]) -> Table:
    table = Table("key", "value", "meaning", box=None, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = True
    section = entries[0].path.rpartition(".")[0]
    for entry in entries:
        if entry.path.rpartition(".")[0] != section:
            table.add_row()
            section = entry.path.rpartition(".")[0]
        meaning, style = escape(entry.description), "bold" if _is_changed(entry) else ""
        meaning += f" [cyan]{escape(entry.allowed)}[/]"
        if style and entry.default != REQUIRED:
            meaning += f" [dim](default: {escape(_text(entry.default))})[/]"
        table.add_row(Text(entry.path, style), Text(_text(entry.value), style), meaning)
    return table


def _is_changed(entry: ConfigEntry) -> bool:
    return bool(entry.value != entry.default)


def _text(value: Any) -> str:
    """A value as it would stand in the YAML."""
    text = yaml.safe_dump(
        to_jsonable_python(value), default_flow_style=True, width=1000, allow_unicode=True
    )
    return str(text).removesuffix("\n").removesuffix("\n...")
