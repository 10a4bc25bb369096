"""What a node has and what it can reach, seen from the node itself; imports no heavy library.

But for one question, which needs torch (`_slow_precision`).
"""

from __future__ import annotations

import platform
import socket
import urllib.request
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from importlib import metadata
from pathlib import Path
from typing import Any

import fsspec

from launcher.preflight.checks import check_data
from launcher.preflight.machine import list_gpus
from mhe_dist.backbone.compiler import missing_compiler
from mhe_dist.config.describe import value_at
from mhe_dist.config.mistakes import ConfigMistake
from mhe_dist.config.schema import Config
from mhe_dist.errors import UserError
from mhe_dist.limits import available_memory
from mhe_dist.redact import scrub
from mhe_dist.tracking.environment import LIBRARIES
from mhe_dist.tracking.factory import mlflow_uri
from mhe_dist.web_address import is_web_address
from pipelines.storage.urls import is_local, resolve_url

DEADLINE_S = 30.0
MLFLOW_S = 15.0
PROBE = ".mhe-probe"
Problems = list[tuple[str, str]]


def probe_node(config: Config) -> dict[str, Any]:
    """Probe this node for a run; plain values, which JSON can carry.

    Returns:
        `host`, `python`, `versions` by package, `gpus` (names), `memory` (bytes available),
        `problems`: pairs of a key and what is wrong with the path or URL that it names, and `slow`:
        what makes the run needlessly slow.
    """
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "gpus": list_gpus(),
        "memory": available_memory(),
        "problems": _problems(config),
        "slow": _slow_precision(config),
    }


def _slow_precision(config: Config) -> str:
    """Why the precision is slow on this node's CPU, in a line; empty: it is not.

    Only who asks for bf16 on CPUs waits for torch to be imported; GPUs are not asked, since the
    process that probes a node may not see them.
    """
    if config.scale.gpu or config.train.precision != "bf16":
        return ""
    import torch

    from mhe_dist.engine.settings import explain_slow_precision

    return explain_slow_precision(config.train.precision, torch.device("cpu"))


def _problems(config: Config) -> Problems:
    """What is wrong with the paths and URLs of a run; one that does not answer in time counts."""
    probes: dict[str, Callable[[Config], Iterable[tuple[str, str]]]] = {
        "data.shards": _data,
        "run.dir": _results,
        "tracking.uri": _mlflow,
        "model.compile": _compiler,
    }
    # The threads of probes that hang are left behind: waiting for them is what must not happen.
    pool = ThreadPoolExecutor(len(probes))
    futures = {key: pool.submit(_listed, probe, config) for key, probe in probes.items()}
    wait_for(futures.values(), DEADLINE_S)
    pool.shutdown(wait=False, cancel_futures=True)
    late = f"does not answer within {DEADLINE_S:.0f} s"
    found: Problems = []
    for key, future in futures.items():
        found += future.result() if future.done() else [(key, late)]
    return found


def _listed(probe: Callable[[Config], Iterable[tuple[str, str]]], config: Config) -> Problems:
    return [(key, scrub(message)) for key, message in probe(config)]


def _data(config: Config) -> Iterable[tuple[str, str]]:
    """What is wrong with the paths of the data; each key with the path that it names."""
    for key, message in check_data(config):
        yield scrub(ConfigMistake(key, value_at(config, key), "").head), message


def _results(config: Config) -> Iterable[tuple[str, str]]:
    """Write a small file where the run's results will be, read it and remove it."""
    url = f"{config.run.dir.rstrip('/')}/{PROBE}-{uuid.uuid4().hex}"
    try:
        filesystem, path = resolve_url(url)
        if is_local(filesystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        with fsspec.open(url, "wb") as file:
            file.write(b"mhe")
        with fsspec.open(url, "rb") as file:
            read = file.read()
        filesystem.rm_file(path)
    except Exception as error:  # every store has errors of its own
        yield "run.dir", f"{config.run.dir} cannot be written: {error}"
    else:
        if read != b"mhe":
            yield "run.dir", f"{config.run.dir} does not give back what was written"


def _mlflow(config: Config) -> Iterable[tuple[str, str]]:
    """Ask an MLflow server whether it lives; a database is not asked."""
    if not config.tracking.mlflow:
        return
    try:
        uri = mlflow_uri(config)
    except UserError as error:
        yield "tracking.uri", str(error)
        return
    if not uri.startswith(("http://", "https://")):
        return
    if not is_web_address(uri):
        yield "tracking.uri", f"{uri} is no address of a server: give http(s)://host:port"
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=MLFLOW_S) as answer:
            if answer.status != 200:
                yield "tracking.uri", f"{uri} answers {answer.status}"
    except (OSError, ValueError) as error:
        yield "tracking.uri", f"no MLflow server answers at {uri}: {error}"


def _compiler(config: Config) -> Iterable[tuple[str, str]]:
    """Whether the node can compile the network."""
    if config.model.compile and (missing := missing_compiler(config.scale.gpu)):
        yield "model.compile", missing.removeprefix("model.compile=true ")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
