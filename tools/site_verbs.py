"""The page of the site about every verb of `mhe`, from what `--help` shows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

BEGIN = """# Command line

Every verb, as `mhe VERB --help` shows it in the terminal. `mhe --debug VERB` shows the traceback of
an error. Exit codes: 0 done, 1 a failure, 2 a mistake that you can cure, 75 a run that was asked to
stop and has saved, 130 Ctrl-C.
"""


def verbs_page() -> str:
    """A section for each verb, and one for each verb of a group."""
    from launcher import cli

    verbs = ((name, cli.load_verb(name)) for name in cli.VERBS)
    return "\n".join([BEGIN, *(part for name, verb in verbs for part in _sections(name, verb, 2))])


def _sections(name: str, verb: Any, level: int) -> Iterator[str]:
    yield f"{'#' * level} mhe {name}\n\n{_help(verb)}\n"
    if hasattr(verb, "commands"):
        for each, command in verb.commands.items():
            yield from _sections(f"{name} {each}", command, level + 1)
        return
    rows = [_row(p) for p in verb.params if p.name != "help" and not getattr(p, "hidden", False)]
    if rows:
        yield "\n".join(["| | default | |", "|---|---|---|", *rows, ""])


def _help(verb: Any) -> str:
    """The text of a verb; its examples as code."""
    lines = inspect.cleandoc(verb.help or "").splitlines()
    return "\n".join(
        f"    {line.removeprefix('Example: ')}" if line.startswith("Example: ") else line
        for line in lines
    )


def _row(parameter: Any) -> str:
    """An argument or an option: how it is written, its default, what it means."""
    argument = parameter.param_type_name == "argument"
    written = parameter.metavar or parameter.name.upper()
    if not argument:
        written = ", ".join([*parameter.opts, *parameter.secondary_opts])
    cells = (f"`{written}`", _default(parameter), getattr(parameter, "help", "") or "")
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "(required)"
    default = parameter.default
    if parameter.param_type_name == "option" and parameter.is_flag:
        # Where there are two names, the one that holds if neither is given.
        pair = parameter.opts if default else parameter.secondary_opts
        return f"`{pair[0]}`" if pair and default is not None else ""
    values = default if isinstance(default, list | tuple) else [default]
    shown = [str(getattr(value, "value", value)) for value in values if value not in (None, "")]
    return ", ".join(f"`{value}`" for value in shown)
