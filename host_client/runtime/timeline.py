"""What the host did when, to be drawn beside the drive's trace: Chrome's Trace Event Format.

The compute thread's tokens and waits, the reading thread's reads, and each staging command from its
submission to its completion (asynchronous spans: several are in flight). Bounded; off unless an
`Engine` is told to record.
"""

from collections.abc import Callable
from typing import Any

from host_client.driver import Timing

COMPUTE, READING, COMMANDS = 1, 2, 3  # threads
_PROCESS = 100  # the drive's processes come before
_NAMES = {COMPUTE: "compute", READING: "reading the window", COMMANDS: "staging commands"}
EVENTS_MAX = 200_000

Event = dict[str, Any]


class HostTimeline:
    """Events on the host's clock, `now_ns`."""

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self.now_ns = now_ns
        self._started_ns = now_ns()
        self._events: list[Event] = []
        self._commands = 0
        self._behind_ns: int | None = None  # host's clock less the drive's, at the least

    def note(self, thread: int, name: str, start_ns: int, end_ns: int | None = None) -> None:
        """A span of one thread, until `end_ns` or now."""
        end_ns = self.now_ns() if end_ns is None else end_ns
        if len(self._events) < EVENTS_MAX:
            span = {"ph": "X", "name": name, "tid": thread, "dur": (end_ns - start_ns) / 1000}
            self._events.append({**span, "ts": start_ns})

    def note_command(self, steps: list[int], asked_ns: int, timing: Timing) -> None:
        """A staging command for these steps has completed, as the drive timed it."""
        now_ns = self.now_ns()
        behind_ns = now_ns - timing.done_ns - timing.late_ns
        if self._behind_ns is None or behind_ns < self._behind_ns:
            self._behind_ns = behind_ns
        self._commands += 1
        if len(self._events) < EVENTS_MAX:
            name = f"stage steps {steps[0]} to {steps[-1]}"
            about = {"cat": "command", "id": self._commands, "tid": COMMANDS, "name": name}
            self._events.append({**about, "ph": "b", "ts": asked_ns})
            self._events.append({**about, "ph": "e", "ts": now_ns})

    def combined(self, drive_page: dict[str, Any]) -> dict[str, Any]:
        """The drive's trace page with the host's events in it.

        In wall time the clocks are brought together by the completion that came through fastest;
        otherwise the drive's clock is its own, and the host's starts at 0.
        """
        shares_clock = drive_page["otherData"]["time"] == "wall" and self._behind_ns is not None
        origin_ns = self._behind_ns if shares_clock else self._started_ns
        assert origin_ns is not None
        name = "host" if shares_clock else "host (a clock of its own)"
        own: list[Event] = [_meta("process_name", 0, name)]
        own += [_meta("thread_name", thread, text) for thread, text in _NAMES.items()]
        for event in self._events:
            own.append({**event, "pid": _PROCESS, "ts": (event["ts"] - origin_ns) / 1000})
        return {**drive_page, "traceEvents": [*drive_page["traceEvents"], *own]}


def _meta(kind: str, thread: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": _PROCESS, "tid": thread, "args": {"name": name}}
