"""Hosts, by the identifier given at Connect: what each holds, and whether it is still there.

All queue pairs of one host share its leases, its residency, and what programs remember of it; all
of it ends with its last queue pair.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from csd_device.compute import Program
from csd_device.dram import Arena, Window
from csd_device.errors import CommandError
from csd_device.firmware.commands import Held, SiteResidency
from csd_device.firmware.models import SiteRecord
from csd_protocol.status import Status

Bools = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Host:
    """One host. `held` [count] by (model, site); a site that is not there: nothing is held."""

    host_id: str
    name: str
    queue_count: int = 0
    held: dict[tuple[int, int], Bools] = field(default_factory=dict)
    memories: dict[int, "_Remembered"] = field(default_factory=dict)  # by program number

    @property
    def residency_bytes(self) -> int:
        """On-drive DRAM of what this host said it holds."""
        return sum(flags.nbytes for flags in self.held.values())

    def holds(self, site: SiteRecord) -> Bools | None:
        """Which units of the site the host holds [count]; None: nothing is said of it.

        Raises CommandError (Invalid Field) when that was said of a model packed differently.
        """
        flags = self.held.get(site.key)
        if flags is not None and flags.size != site.count:
            raise CommandError(
                Status.INVALID_FIELD,
                f"residency of {site.name} was set for {flags.size} units; it now has "
                f"{site.count}. Send HOST_RESIDENCY again",
            )
        return flags


@dataclass(frozen=True, slots=True)
class _Remembered:
    """What one program remembers of one host."""

    program: Program
    memory: Any


class HostTable:
    """The hosts that are connected."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._hosts: dict[str, Host] = {}

    @property
    def queue_count(self) -> int:
        return sum(host.queue_count for host in self._hosts.values())

    def __len__(self) -> int:
        return len(self._hosts)

    def attach(self, host_id: str, name: str) -> Host:
        """One more queue pair of this host."""
        host = self._hosts.get(host_id)
        if host is None:
            self._arena.allot(_allotment(host_id), 0)
            host = self._hosts[host_id] = Host(host_id, name)
        host.queue_count += 1
        return host

    def detach(self, host: Host, window: Window) -> None:
        """One queue pair less; with the last one leases and residency go back."""
        host.queue_count -= 1
        if host.queue_count == 0:
            del self._hosts[host.host_id]
            self._forget(host, tuple(host.memories))
            self._arena.free(_allotment(host.host_id))
            window.release_owner(host.host_id)

    def set_residency(self, host: Host, site: SiteRecord, said: SiteResidency) -> None:
        """Raises CommandError: Invalid Field for a bitmap of another length, DRAM exceeded."""
        before = host.held.get(site.key)
        if said.held is Held.NONE:
            host.held.pop(site.key, None)
        else:
            host.held[site.key] = _flags(site, said)
        try:
            self._arena.resize(_allotment(host.host_id), host.residency_bytes)
        except CommandError:
            host.held.pop(site.key, None)
            if before is not None:
                host.held[site.key] = before
            raise

    def memory(self, host: Host, number: int, program: Program) -> Any:
        """What the program of this number remembers of a host; None when it remembers nothing.

        Raises CommandError (DRAM exceeded) when there is no room for a first memory.
        """
        if not program.memory_bytes:
            return None
        remembered = host.memories.get(number)
        if remembered is None or remembered.program is not program:
            self._forget(host, (number,))
            self._arena.allot(_memory_allotment(host, number), program.memory_bytes)
            remembered = host.memories[number] = _Remembered(program, program.new_memory())
        return remembered.memory

    def forget_program(self, number: int) -> None:
        """A program is gone, and with it what it remembered of every host."""
        for host in self._hosts.values():
            self._forget(host, (number,))

    def _forget(self, host: Host, numbers: tuple[int, ...]) -> None:
        for number in numbers:
            if host.memories.pop(number, None) is not None:
                self._arena.free(_memory_allotment(host, number))


def _memory_allotment(host: Host, number: int) -> str:
    return f"memory.{number}.{host.host_id}"


def _allotment(host_id: str) -> str:
    return f"residency.{host_id}"


def _flags(site: SiteRecord, said: SiteResidency) -> Bools:
    if said.held is Held.ALL:
        return np.ones(site.count, np.bool_)
    return flags_of(site, said.bitmap)


def flags_of(site: SiteRecord, bitmap: bytes) -> Bools:
    """Which units of the site a bitmap names [count].

    Raises CommandError (Invalid Field) for one of another length.
    """
    wanted_bytes = -(-site.count // 8)
    if len(bitmap) != wanted_bytes:
        raise CommandError(
            Status.INVALID_FIELD,
            f"bitmap of {len(bitmap)} bytes for {site.name}; "
            f"its {site.count} units take {wanted_bytes}",
        )
    packed = np.frombuffer(bitmap, np.uint8)
    return np.unpackbits(packed, count=site.count, bitorder="little").view(np.bool_)
