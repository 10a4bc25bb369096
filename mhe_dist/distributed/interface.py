"""The network interface that ranks talk through, and the port at which they meet.

Gloo alone would take the interface of the hostname. Debian and its kin give that an address of the
loopback (`127.0.1.1 NAME` in /etc/hosts), and gloo then tells ranks of other hosts to connect to
themselves.
"""

from __future__ import annotations

import os
import socket
from ipaddress import ip_address

import psutil

VARIABLE = "GLOO_SOCKET_IFNAME"
# Kept for documentation: nobody has it, and the default route leads there.
_ANY_OTHER_HOST = "192.0.2.1"


def choose_gloo_interface() -> None:
    """Let gloo use the interface that leads to rank 0, unless the environment names one.

    Reads MASTER_ADDR, WORLD_SIZE and LOCAL_WORLD_SIZE, and sets GLOO_SOCKET_IFNAME. Where no
    interface is found, gloo looks for one by itself.
    """
    if os.environ.get(VARIABLE) or "MASTER_ADDR" not in os.environ:
        return
    world = os.environ["WORLD_SIZE"]
    spans_hosts = os.environ.get("LOCAL_WORLD_SIZE", world) != world
    address = local_address(os.environ["MASTER_ADDR"])
    if spans_hosts and (not address or ip_address(address).is_loopback):
        # torchrun names rank 0 by its hostname, which on that host is one of the loopback.
        address = local_address(_ANY_OTHER_HOST)
    if name := interface_of(address):
        os.environ[VARIABLE] = name


def hold_port(address: str = "127.0.0.1") -> socket.socket:
    """A socket with a free port of this machine, which nobody else gets until it is closed.

    It is bound and does not listen, so a server that reuses addresses, as torch's store does, can.

    Args:
        address: of this machine; the port is one of its version of IP.
    """
    holder = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))
    return holder


def local_address(host: str) -> str:
    """Own address towards a host (name or address); empty: no route. Nothing is sent."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return ""


def interface_of(address: str) -> str:
    """Name of the interface with that address; empty: none has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return ""
