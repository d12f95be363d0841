"""How much of what drive and host each do in decode happens while the other works.

Read from a timeline of both (`csd generate --time wall --trace`), whose clocks are one. The drive
works while any of its resources does: a die, a channel, DRAM, the link, the compute engine. The
host computes while it decodes and does not wait for the drive. Whichever of the two needs less time
in all could be hidden behind the other entirely; the share of it that is hidden is the measure.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from host_client.runtime.refusals import RequestRefused

F64 = npt.NDArray[np.float64]

STEADY_FROM = 2  # tokens: the prompt's, and one that fills the pipeline, are left out
HOST = "host"
COMPUTING, WAITING, READING = "computing", "waiting for the drive", "reading the window"
WORKS = ("drive: compute engine", "drive: DRAM", "drive: link", "drive: channels", "drive: dies")

Event = dict[str, Any]


class NotATimeline(RequestRefused):
    """A trace from which overlap cannot be read; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Of the steady part of decode. Spans: float64 [n, 2], start and end in microseconds."""

    tokens: int
    start_us: float
    end_us: float
    token_starts_us: list[float]
    computing: F64  # disjoint and ascending, as all of these
    drive: F64  # any of its resources works
    lanes: dict[str, F64]  # to be drawn: the host's threads, the drive's kinds of resources

    @property
    def whole_us(self) -> float:
        return self.end_us - self.start_us

    @property
    def computing_us(self) -> float:
        return length_of(self.computing)

    @property
    def drive_us(self) -> float:
        return length_of(self.drive)

    @property
    def both_us(self) -> float:
        return length_of(intersection(self.computing, self.drive))

    @property
    def is_drive_longer(self) -> bool:
        return self.drive_us > self.computing_us

    @property
    def hidden(self) -> float:
        """The share of the shorter one's time in which the other works as well, 0 to 1."""
        shorter_us = min(self.computing_us, self.drive_us)
        return self.both_us / shorter_us if shorter_us else 1.0


def read_overlap(page: dict[str, Any]) -> Overlap:
    """From a trace in Chrome's Trace Event Format. Raises NotATimeline."""
    told = page.get("otherData", {})
    events: list[Event] = page.get("traceEvents", [])
    processes = {
        event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"
    }
    if told.get("time") != "wall" or HOST not in processes.values():
        raise NotATimeline(
            "host and drive do not share a clock in this trace: record it with csd generate "
            "--time wall --trace FILE"
        )
    if told.get("spans_left_out"):
        raise NotATimeline(
            f"the trace lacks {told['spans_left_out']:,} spans of the drive that had no room: "
            f"generate fewer tokens"
        )
    own = [event for event in events if event["ph"] == "X" and processes[event["pid"]] == HOST]
    tokens = sorted(_spans(event for event in own if event["name"].startswith("token ")))
    if len(tokens) <= STEADY_FROM:
        raise NotATimeline(
            f"the trace has {len(tokens)} tokens; overlap is of those behind the first "
            f"{STEADY_FROM}: raise --max-new-tokens"
        )
    start_us, end_us = tokens[STEADY_FROM][0], tokens[-1][1]
    lanes = {name: _spans_of(events, processes, name) for name in WORKS}
    steady = np.array([[start_us, end_us]])
    waiting = union(_spans(event for event in own if event["name"].startswith("wait ")))
    computing = without(steady, waiting)
    reading = union(_spans(event for event in own if event["name"].startswith("read ")))
    inside = {name: intersection(steady, union(spans)) for name, spans in lanes.items()}
    return Overlap(
        tokens=len(tokens) - STEADY_FROM,
        start_us=start_us,
        end_us=end_us,
        token_starts_us=[start for start, _ in tokens[STEADY_FROM:]],
        computing=computing,
        drive=union([span for spans in inside.values() for span in spans.tolist()]),
        lanes={
            COMPUTING: computing,
            WAITING: intersection(steady, waiting),
            READING: intersection(steady, reading),
            **{name: spans for name, spans in inside.items() if spans.size},
        },
    )


def _spans_of(events: list[Event], processes: dict[int, str], name: str) -> list[list[float]]:
    return _spans(
        event for event in events if event["ph"] == "X" and processes[event["pid"]] == name
    )


def _spans(events: Iterable[Event]) -> list[list[float]]:
    return [[event["ts"], event["ts"] + event["dur"]] for event in events]


# ---- sets of time: float64 [n, 2], disjoint and ascending --------------------------------------


def union(spans: list[list[float]]) -> F64:
    """All of these times; they may overlap, in any order."""
    if not spans:
        return np.empty((0, 2))
    ordered = np.array(sorted(spans))
    ends = np.maximum.accumulate(ordered[:, 1])
    first = np.append(True, ordered[1:, 0] > ends[:-1])
    last = np.append(first[1:], True)
    return np.column_stack((ordered[first, 0], ends[last]))


def without(all_of: F64, taken: F64) -> F64:
    """What is in the first and not in the second."""
    if not taken.size or not all_of.size:
        return all_of
    low, high = min(all_of[0, 0], taken[0, 0]) - 1, max(all_of[-1, 1], taken[-1, 1]) + 1
    edges = np.concatenate(([low], taken.reshape(-1), [high])).reshape(-1, 2)
    return intersection(all_of, edges)


def intersection(one: F64, other: F64) -> F64:
    """What is in both."""
    if not one.size or not other.size:
        return np.empty((0, 2))
    edges = np.unique(np.concatenate((one.reshape(-1), other.reshape(-1))))
    middles = (edges[:-1] + edges[1:]) / 2
    both = _holds(one, middles) & _holds(other, middles)
    return union(np.column_stack((edges[:-1][both], edges[1:][both])).tolist())


def length_of(spans: F64) -> float:
    return float((spans[:, 1] - spans[:, 0]).sum())


def _holds(spans: F64, times: F64) -> npt.NDArray[np.bool_]:
    """Whether each time lies in one of the spans."""
    at = np.searchsorted(spans[:, 0], times, side="right") - 1
    inside: npt.NDArray[np.bool_] = (at >= 0) & (times < spans[np.maximum(at, 0), 1])
    return inside
