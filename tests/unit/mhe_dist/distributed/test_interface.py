"""Which interface gloo is told to use, and at which port ranks meet."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from mhe_dist.distributed import interface, spawn
from mhe_dist.distributed.interface import VARIABLE, choose_gloo_interface

OTHER_HOST, OWN_ADDRESS = "10.77.0.9", "10.77.0.2"


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with a loopback, a bridge of Docker and a network card that leads to all others."""
    own = {"127.0.0.1": "127.0.0.1", "myself": "127.0.1.1"}
    names = {"127.0.0.1": "lo", "172.17.0.1": "docker0", OWN_ADDRESS: "eth0"}
    monkeypatch.setattr(interface, "local_address", lambda host: own.get(host, OWN_ADDRESS))
    monkeypatch.setattr(interface, "interface_of", lambda address: names.get(address, ""))
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("master", "world", "local", "chosen"),
    [
        (OTHER_HOST, "4", "2", "eth0"),
        ("127.0.0.1", "2", "2", "lo"),
        ("127.0.0.1", "2", None, "lo"),
        # torchrun on the host of rank 0, which Debian's /etc/hosts gives an address of the loopback
        ("myself", "4", "2", "eth0"),
        ("myself", "2", "2", None),
    ],
)
def test_the_interface_that_leads_to_rank_0(
    master: str, world: str, local: str | None, chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", master)
    monkeypatch.setenv("WORLD_SIZE", world)
    if local is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    choose_gloo_interface()
    assert interface.os.environ.get(VARIABLE) == chosen
    monkeypatch.delenv(VARIABLE, raising=False)


def test_one_that_somebody_named_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "ib0")
    choose_gloo_interface()
    assert interface.os.environ[VARIABLE] == "ib0"


def test_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert interface.local_address("127.0.0.1") == "127.0.0.1"
    assert interface.interface_of("127.0.0.1") == "lo"
    assert interface.local_address("no-such-host.invalid") == ""
    assert interface.interface_of("") == ""


def test_the_port_of_ranks_that_start_is_nobody_else_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(function: Any, settings: tuple[Any, ...], **_: Any) -> None:
        ports.append(settings[3])
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", settings[3]))

    ports: list[int] = []
    monkeypatch.setattr(spawn.mp, "start_processes", start)
    assert spawn.run_ranks(print, 0, start_method="forkserver") == []
    with socket.socket() as other:
        other.bind(("", ports[0]))
