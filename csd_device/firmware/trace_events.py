"""A trace as Chrome's Trace Event Format, which ui.perfetto.dev opens.

One process a kind of resource, one thread a resource: commands by queue and slot with their parts
below, firmware cores, the compute engine, DRAM, the link's directions, channels, dies. Leases are
asynchronous spans; what the window holds is a counter. `ts` and `dur` are microseconds of the drive
clock; three decimals are nanoseconds.

Spans of one thread never overlap. Commands of one queue do: each takes the lowest slot that is
free. Reads that overtake a program or an erase cut it: it is drawn in pieces, up to where it would
have ended without them.
"""

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import groupby
from typing import Any

from csd_device.firmware.trace import (
    CHANNELS,
    DIES,
    DRAM,
    FIRMWARE,
    LINK,
    PROGRAMS,
    Span,
    Trace,
    TracedCommand,
)

Event = dict[str, Any]

_QUEUES, _LEASES = 1, 8
_GROUPS = {FIRMWARE: 2, PROGRAMS: 3, DRAM: 4, LINK: 5, CHANNELS: 6, DIES: 7}  # process numbers
_PROCESS_NAMES = {
    _QUEUES: "drive: queues",
    _GROUPS[FIRMWARE]: "drive: firmware",
    _GROUPS[PROGRAMS]: "drive: compute engine",
    _GROUPS[DRAM]: "drive: DRAM",
    _GROUPS[LINK]: "drive: link",
    _GROUPS[CHANNELS]: "drive: channels",
    _GROUPS[DIES]: "drive: dies",
    _LEASES: "drive: window",
}
_LINK_NAMES = ("to the host", "from the host")
_SLOTS = 1 << 16  # threads of one queue


def trace_events(trace: Trace) -> list[Event]:
    """All events of a trace, names first."""
    events = [_meta("process_name", pid, 0, {"name": name}) for pid, name in _PROCESS_NAMES.items()]
    events += [_meta("process_sort_index", pid, 0, {"sort_index": pid}) for pid in _PROCESS_NAMES]
    for part in (_command_events(trace.commands), _span_events(trace), _lease_events(trace)):
        events += part
    return events


def _command_events(commands: list[TracedCommand]) -> Iterator[Event]:
    named = set()
    for slot, command in _slotted(commands):
        thread = command.queue * _SLOTS + slot
        if thread not in named:
            named.add(thread)
            name = f"queue {command.queue} ({command.host}), slot {slot}"
            yield _meta("thread_name", _QUEUES, thread, {"name": name})
        arguments: dict[str, Any] = {
            "cid": command.cid,
            "host": command.host,
            "status": command.status,
        }
        for part, start_ns, end_ns in command.steps:
            key = f"{part}_ns"
            arguments[key] = arguments.get(key, 0) + end_ns - start_ns
        yield _complete(command.name, _QUEUES, thread, command.start_ns, command.end_ns, arguments)
        for part, start_ns, end_ns in command.steps:
            yield _complete(part, _QUEUES, thread, start_ns, end_ns, {})


def _slotted(commands: list[TracedCommand]) -> Iterator[tuple[int, TracedCommand]]:
    """Each command with the lowest slot of its queue that is free when it starts."""
    ordered = sorted(commands, key=lambda command: (command.queue, command.start_ns))
    for _, group in groupby(ordered, key=lambda command: command.queue):
        free: list[int] = []
        busy: list[tuple[int, int]] = []  # until when, slot
        slots = 0
        for command in group:
            while busy and busy[0][0] <= command.start_ns:
                heappush(free, heappop(busy)[1])
            if not free:
                heappush(free, slots)
                slots += 1
            slot = heappop(free)
            heappush(busy, (command.end_ns, slot))
            yield slot, command


def _span_events(trace: Trace) -> Iterator[Event]:
    ordered = sorted(trace.spans, key=lambda span: (span.group, span.member, span.start_ns))
    for (group, index), found in groupby(ordered, key=lambda span: (span.group, span.member)):
        pid, spans = _GROUPS[group], list(found)
        yield _meta("thread_name", pid, index, {"name": _thread_name(group, index)})
        for span in _cut(spans) if group == DIES else spans:
            arguments = {"command": span.command}
            yield _complete(span.name, pid, index, span.start_ns, span.end_ns, arguments)


def _cut(spans: list[Span]) -> Iterator[Span]:
    """One die's spans, ascending: programs and erases less the reads that overtook them."""
    reads = [span for span in spans if span.name == "read"]
    first = 0
    for span in spans:
        if span.name == "read":
            yield span
            continue
        at_ns = span.start_ns
        while first < len(reads) and reads[first].end_ns <= at_ns:
            first += 1
        for read in reads[first:]:
            if read.start_ns >= span.end_ns:
                break
            if read.start_ns > at_ns:
                yield span._replace(start_ns=at_ns, end_ns=read.start_ns)
            at_ns = max(at_ns, read.end_ns)
        if at_ns < span.end_ns:
            yield span._replace(start_ns=at_ns)


def _lease_events(trace: Trace) -> Iterator[Event]:
    changes: list[tuple[int, int]] = []  # when, bytes more
    for lease in trace.all_leases():
        arguments = {"bytes": lease.size_bytes, "host": lease.owner}
        begin = _async("b", lease.id, lease.start_ns)
        yield {**begin, "args": arguments}
        changes.append((lease.start_ns, lease.size_bytes))
        if lease.end_ns is not None:
            yield _async("e", lease.id, lease.end_ns)
            changes.append((lease.end_ns, -lease.size_bytes))
    held_bytes = 0
    for at_ns, more in sorted(changes):
        held_bytes += more
        yield {
            "ph": "C",
            "name": "bytes under lease",
            "pid": _LEASES,
            "tid": 0,
            "ts": at_ns / 1000,
            "args": {"bytes": held_bytes},
        }


def _thread_name(group: str, index: int) -> str:
    if group == LINK:
        return _LINK_NAMES[index]
    return f"{group} {index}" if group in (FIRMWARE, CHANNELS, DIES) else group


def _async(phase: str, lease: int, at_ns: int) -> Event:
    return {
        "ph": phase,
        "cat": "lease",
        "id": lease,
        "name": f"lease {lease}",
        "pid": _LEASES,
        "tid": 0,
        "ts": at_ns / 1000,
    }


def _complete(
    name: str, pid: int, tid: int, start_ns: int, end_ns: int, arguments: dict[str, Any]
) -> Event:
    event = {
        "ph": "X",
        "name": name,
        "pid": pid,
        "tid": tid,
        "ts": start_ns / 1000,
        "dur": (end_ns - start_ns) / 1000,
    }
    return {**event, "args": arguments} if arguments else event


def _meta(name: str, pid: int, tid: int, arguments: dict[str, Any]) -> Event:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": arguments}
