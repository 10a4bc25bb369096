"""A network between hosts that this process carries packet by packet, so that it can be bad.

Each host gets a TUN device; a thread reads what a host sends and writes it to the host that it is
addressed to. `tc netem` would delay and lose packets too, but not every kernel has it, and nothing
of this network is visible outside of the hosts.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

TUN = "/dev/net/tun"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PACKET_BYTES = 65_536
_DESTINATION = slice(16, 20)  # of an IPv4 header
_IDLE_S = 0.2


@dataclass(order=True)
class _InFlight:
    due: float
    number: int
    destination: bytes = field(compare=False)
    packet: bytes = field(compare=False)


class Wire:
    """The network. It can be changed at any time.

    Attributes:
        delay_s: time that a packet takes, in each direction.
        loss: share of the packets that get lost.
        lost, carried: packets so far.
    """

    def __init__(self, seed: int = 0) -> None:
        self.delay_s = self.loss = 0.0
        self.lost = self.carried = 0
        self._devices: dict[bytes, int] = {}
        self._cut: set[bytes] = set()
        self._draws = random.Random(seed)
        self._is_open = True
        self._thread = threading.Thread(target=self._carry, name="wire", daemon=True)
        self._thread.start()

    def attach(self, address: str) -> str:
        """Make the device of a host with an IPv4 address; its name in this namespace."""
        device = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
        request = struct.pack("16sH22x", b"mhe%d", _IFF_TUN | _IFF_NO_PI)
        answer = fcntl.ioctl(device, _TUNSETIFF, request)
        self._devices[socket.inet_aton(address)] = device
        return answer[:16].rstrip(b"\0").decode()

    def cut(self, address: str) -> None:
        """Unplug a host: what it sends and what is sent to it is lost, and nobody is told."""
        self._cut.add(socket.inet_aton(address))

    def mend(self, address: str) -> None:
        """Plug a host in again."""
        self._cut.discard(socket.inet_aton(address))

    def close(self) -> None:
        """End the network; the devices end with it."""
        self._is_open = False
        self._thread.join()
        for device in self._devices.values():
            os.close(device)

    def _carry(self) -> None:
        in_flight: list[_InFlight] = []
        while self._is_open:
            wait = min(_IDLE_S, in_flight[0].due - time.monotonic()) if in_flight else _IDLE_S
            sources = {device: address for address, device in list(self._devices.items())}
            for device in select.select(list(sources), [], [], max(0.0, wait))[0]:
                self._take(device, sources[device], in_flight)
            while in_flight and in_flight[0].due <= time.monotonic():
                self._deliver(heapq.heappop(in_flight))

    def _take(self, device: int, source: bytes, in_flight: list[_InFlight]) -> None:
        """Read all that a host has sent."""
        while True:
            try:
                packet = os.read(device, _PACKET_BYTES)
            except OSError:  # nothing more, or the device of a host that has ended
                return
            self.carried += 1
            if source in self._cut or self._draws.random() < self.loss:
                self.lost += 1
                continue
            due = time.monotonic() + self.delay_s
            heapq.heappush(in_flight, _InFlight(due, self.carried, packet[_DESTINATION], packet))

    def _deliver(self, item: _InFlight) -> None:
        device = self._devices.get(item.destination)
        if device is None or item.destination in self._cut:
            self.lost += 1
            return
        try:
            os.write(device, item.packet)
        except OSError:  # its host has ended, or its queue is full
            self.lost += 1
