"""Hosts made of namespaces: each with a name, an address, processes, /tmp and /dev/shm of its own.

They share the kernel, the clock and the file system, where nothing is put over it. All of a host
ends with the first process of its namespace, so nothing is left when a `with` block ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.hosts.wire import TUN, Wire
from tests.support.terminal import until
from tests.support.waiting import WATCHDOG_S, ended

ROOT = Path(__file__).parents[2]
NETWORK = "10.77.0"
_NEW = ("--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")

# `$1`: its name; the others: folders below /tmp that it sees all the same. The name is that of the
# loopback, as on Debian and Ubuntu, and the address of Docker's bridge is the same on all hosts, as
# it is anywhere.
_BEGIN = """
name="$1"
shift
hostname "$name"
mount --rbind /tmp /mnt
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /dev/shm
mkdir /tmp/home
for kept; do
  mkdir -p "$kept"
  mount --bind "/mnt${kept#/tmp}" "$kept"
done
umount --lazy /mnt
printf '127.0.0.1 localhost\\n127.0.1.1 %s\\n' "$name" >/tmp/hosts
mount --bind /tmp/hosts /etc/hosts
ip link set lo up
ip link add docker0 type bridge
ip addr add 172.17.0.1/16 dev docker0
ip link set docker0 up
trap '' CHLD  # the kernel buries its orphans
echo ready
exec sleep infinity
"""

_KNOCK = """
import socket, sys, time
deadline = time.monotonic() + float(sys.argv[3])
while True:
    try:
        socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).close()
        break
    except OSError:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.2)
"""


def why_not() -> str:
    """Why no hosts can be made here; empty if they can."""
    if not os.access(TUN, os.R_OK | os.W_OK):
        return f"{TUN} cannot be opened"
    try:
        command = ["unshare", *_NEW, "ip", "link", "set", "lo", "up"]
        tried = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return tried.stderr.strip() if tried.returncode else ""


class Host:
    """One host.

    Attributes:
        name: its hostname.
        address: IPv4.
        environment: of the commands that are started on it.
    """

    def __init__(self, name: str, number: int, wire: Wire, shared: Path) -> None:
        self.name, self.address, self._wire = name, f"{NETWORK}.{number}", wire
        self.environment = {
            "HOME": "/tmp/home",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "200",
        }
        # What is shared, and the programs, where the checkout is below /tmp.
        kept = [path for path in (shared, ROOT, Path(sys.prefix)) if path.is_relative_to("/tmp")]
        self._unshare = subprocess.Popen(
            ["unshare", *_NEW, "sh", "-euc", _BEGIN, "sh", name, *map(str, kept)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        until(self._unshare, "ready")
        (first,) = psutil.Process(self._unshare.pid).children()
        self._first = first
        device = wire.attach(self.address)
        _ip(f"link set {device} netns {first.pid} name eth0")
        for words in (
            f"addr add {self.address}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {NETWORK}.254",
        ):
            self.check("ip", *words.split())

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        """Start a command on this host."""
        inside = ["nsenter", "--target", str(self._first.pid), "--all", "--wd=/tmp", "--"]
        return subprocess.Popen(
            [*inside, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**self.environment, **variables},
        )

    def run(self, *command: str, **variables: str) -> tuple[int, str]:
        """Exit code of a command on this host, and all that it printed."""
        process = self.start(*command, **variables)
        output = ended(process)
        return process.returncode, output

    def check(self, *command: str) -> str:
        """What a command that succeeds printed."""
        code, output = self.run(*command)
        assert code == 0, output
        return output

    def unplug(self) -> None:
        """Cut its link; nothing on it is told."""
        self._wire.cut(self.address)

    def plug(self) -> None:
        """Mend its link."""
        self._wire.mend(self.address)

    def lose(self) -> None:
        """As a power cut does: nobody hears of it, and all of its processes end."""
        self.unplug()
        self.end()

    def end(self) -> None:
        """End all of its processes."""
        if self._first.is_running():
            self._first.kill()
        self._unshare.wait()
        assert self._unshare.stdout
        self._unshare.stdout.close()


@contextmanager
def hosts(shared: Path, *names: str) -> Iterator[tuple[Wire, list[Host]]]:
    """Hosts that reach one another, for the length of a `with` block.

    Args:
        shared: a folder that all of them see, at the same path.
        names: of the hosts; their addresses are 10.77.0.1 and so on.
    """
    wire, made = Wire(), list[Host]()
    try:
        for number, name in enumerate(names, 1):
            made.append(Host(name, number, wire, shared))
        yield wire, made
    finally:
        for host in made:
            host.end()
        wire.close()


def until_answers(host: Host, address: str, port: int) -> None:
    """Wait until a host reaches a port."""
    host.check(sys.executable, "-c", _KNOCK, address, str(port), str(WATCHDOG_S))


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)
