"""A command of `mhe` as a job: what is sent, and what the job's driver does with it there."""

from __future__ import annotations

import json
import os
import socket
import sys
import uuid
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, Final, NamedTuple

from launcher.ray_cluster.code_package import CodePackage, copy_code
from launcher.ray_cluster.connection import OWN_CLUSTER, ask_nodes, existing_cluster
from launcher.ray_cluster.jobs import RUN_KEY, Submission, job_entrypoint, stop_environment
from mhe_dist.config.section import local_path
from mhe_dist.errors import UserError
from pipelines.storage.urls import is_local_url

COMMAND_FILE: Final = "command.json"
_PROBE = ".mhe-probe"
_UNSHARED = (
    "its results would end with that node: name a folder of a file system that all nodes mount"
)


class SpreadCommand(NamedTuple):
    """A command whose tasks run on a cluster.

    Attributes:
        words: after `mhe`, without an address.
        results: path or URL that it writes to, as typed.
    """

    words: list[str]
    results: str

    @staticmethod
    def parse(verb: Any, words: Sequence[str]) -> SpreadCommand:
        """Read a command as `mhe` would, without running it.

        Args:
            verb: Typer's command, or group, of the first word; the callbacks of its options look at
                the disk of this machine, and are left to the node that runs it.
            words: after `mhe`.

        Raises:
            UserError: its tasks run on no cluster.
            UsageError: of Typer; it is typed wrongly.
        """
        context = _parse(verb, list(words))
        if "address" not in context.params:
            name = context.command_path
            raise UserError(
                f"{name} does its work in one process, which needs no cluster: type it without "
                "submit"
            )
        given = context.params
        results = local_path(given.get("out") or given.get("run") or given["tars"][0])
        return SpreadCommand(list(words), results)

    @property
    def name(self) -> str:
        """Of its jobs: the verb, and what it writes to."""
        last = Path(self.results.rstrip("/")).name
        kept = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in last)
        return f"{self.words[0]}-{kept}"


def _parse(command: Any, words: list[str], parent: Any = None) -> Any:
    """The context of the innermost command of some words."""
    name = words[0] if parent else f"mhe {words[0]}"
    command = copy(command)
    command.params = [_without_callback(param) for param in command.params]
    context = command.make_context(name, words[1:], parent=parent)
    if not hasattr(command, "commands"):
        return context
    _, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    return _parse(inner, [str(inner and inner.name), *rest], context)


def _without_callback(param: Any) -> Any:
    param = copy(param)
    if not param.is_eager:  # as --help is
        param.callback = None
    return param


def prepare_command(
    command: SpreadCommand,
    address: str,
    attempt: int,
    variables: dict[str, str],
    width: int,
    folder: Path,
) -> Submission:
    """Put together what starts a command as a job.

    Args:
        command: whose relative paths mean this process's folder.
        address: of the cluster.
        attempt: number of the job among those of this name.
        variables: further variables for driver and tasks.
        width: columns of the terminal that will show its tables.
        folder: an empty folder, for what is sent.
    """
    copy_code(folder)
    content = {
        "words": command.words,
        "results": command.results,
        "folder": str(Path.cwd()),
        "typed": sys.argv[1:],
    }
    (folder / COMMAND_FILE).write_text(json.dumps(content), encoding="utf-8")
    return Submission(
        id=f"{command.name}-{attempt}",
        entrypoint=job_entrypoint(address, "command", COMMAND_FILE),
        # No others: the driver sets those of the tasks, and Ray takes no variable from both.
        environment=stop_environment() | {"COLUMNS": str(width)} | variables,
        metadata={RUN_KEY: command.name},
        package=CodePackage.of(folder),
    )


def open_submitted(file: str) -> list[str]:
    """In the job: go where a command was typed; its words, with the address of this cluster.

    Raises:
        UserError: what it writes would be lost with a node.
    """
    given = json.loads(Path(file).read_text(encoding="utf-8"))
    if is_there := Path(given["folder"]).is_dir():
        os.chdir(given["folder"])
    refuse_unshared(given["results"], given["folder"], is_there)
    sys.argv[1:] = given["typed"]  # what says how to go on names the command that was submitted
    return [*given["words"], "--address", OWN_CLUSTER]


def refuse_unshared(results: str, folder: str, is_there: bool) -> None:
    """Refuse results in a folder that other nodes of this cluster do not have.

    Args:
        results: path or URL, as typed.
        folder: where it was typed.
        is_there: whether that folder is on this node, too, and is its working folder now.

    Raises:
        UserError: names the nodes, and the cure.
    """
    if not is_local_url(results):
        return
    host = socket.gethostname()
    if not is_there and not os.path.isabs(results):
        raise UserError(
            f"{results}: is below {folder}, where the command was typed, and {host}, where it "
            f"runs, has no such folder; {_UNSHARED}, or a URL"
        )
    existing = Path(results).absolute()
    while not existing.is_dir():
        existing = existing.parent
    probe = existing / f"{_PROBE}-{uuid.uuid4().hex}"
    try:
        probe.touch()
    except OSError as error:
        raise UserError(f"{results}: cannot be written on {host}: {error}") from error
    try:
        blind = _nodes_without(str(probe))
    finally:
        probe.unlink()
    if blind:
        raise UserError(
            f"{results}: is on {host} alone, {', '.join(sorted(blind))} cannot see it; {_UNSHARED}"
        )


def _nodes_without(path: str) -> list[str]:
    """The hosts of this cluster that do not see a file."""
    with existing_cluster(OWN_CLUSTER):
        answers = ask_nodes(os.path.exists, path)
        return [node["NodeManagerHostname"] for node, is_seen in answers if not is_seen]
