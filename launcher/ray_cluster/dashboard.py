"""The dashboard of a Ray cluster: its address, whether it answers, and its Jobs client."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from launcher.ray_cluster import ray_internals
from mhe_dist.errors import RunError, UserError
from mhe_dist.redact import scrub
from mhe_dist.web_address import is_web_address

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CONNECT_S = 5.0
ANSWER_S = 60.0  # that a busy dashboard may take
_NOISY_LOGGERS = (  # of Ray; they report each upload and each lost connection
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


def resolve_address(address: str) -> str:
    """The address as given, else that of the environment, else that of this machine.

    Raises:
        UserError: it is no `http(s)://` URL, or has a port that there is not.
    """
    source = "--address" if address else ADDRESS_VARIABLE
    address = address or os.environ.get(ADDRESS_VARIABLE, "") or DEFAULT_ADDRESS
    if not is_web_address(address):
        raise UserError(
            f"{source}={scrub(address)}: give the cluster's dashboard, http://HEAD:8265"
        )
    return address.rstrip("/")


def is_loopback(address: str) -> bool:
    """Whether an address is on this machine."""
    return urlsplit(address).hostname in LOOPBACK


def create_client(address: str) -> Any:
    """A `JobSubmissionClient` of the dashboard at an address that `resolve` gave.

    Raises:
        UserError: nothing answers there, or it wants another token.
        RunError: it takes connections and does not answer.
    """
    _check_reachable(address)
    with translate_errors(address):
        from ray.job_submission import JobSubmissionClient

        # What has just been reached needs no proxy of the environment.
        direct = {"no_proxy": urlsplit(address).hostname}

        class Client(JobSubmissionClient):
            """One that does not wait for ever (`_do_request`: checked with Ray 2.60.0)."""

            def _do_request(self, *request: Any, **options: Any) -> Any:
                options = {"timeout": ANSWER_S, "proxies": direct, **options}
                return super()._do_request(*request, **options)

        quiet_job_client()
        ray_internals.enable_token_auth()
        return Client(address)


def quiet_job_client() -> None:
    """Let the client of the Jobs API log warnings only (logger names of Ray 2.60.0)."""
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def connection_error() -> type[Exception]:
    """What a Jobs client may raise when the connection that it reads from breaks."""
    from aiohttp import ClientError

    return ClientError


@contextmanager
def translate_errors(address: str) -> Iterator[None]:
    """Ray's errors in our words."""
    try:
        yield
    except Exception as error:
        kind, text = type(error).__name__, scrub(str(error))
        if kind == "AuthenticationError":
            raise UserError(
                f"{address} wants another token: set RAY_AUTH_TOKEN, or the file "
                "~/.ray/auth_token, to the token that the cluster was started with"
            ) from error
        if "already exists" in text:
            raise UserError(
                "this run has just been submitted by somebody else: mhe jobs"
            ) from error
        if isinstance(error, ConnectionError):
            raise UserError(f"{address} is not a Ray dashboard: {text}") from error
        if isinstance(error, OSError):  # what requests raises is one
            raise RunError(f"{address} does not answer: {text}") from error
        if isinstance(error, RuntimeError):
            raise RunError(f"{address}: {text}") from error
        raise


def _check_reachable(address: str) -> None:
    """See in a few seconds whether anything listens there: Ray's client would wait for ever."""
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((str(parts.hostname), port), CONNECT_S).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host, such as a..b
        raise UserError(
            f"no Ray cluster answers at {scrub(address)} ({error}). Name the dashboard of a "
            f"running one with --address or {ADDRESS_VARIABLE}, or start one here: "
            "ray start --head --disable-usage-stats"
        ) from error
