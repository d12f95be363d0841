"""The persistent event log: what happened to the drive, over all its power cycles."""

from collections import deque
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

from csd_device.firmware.log_folder import LogFolder

EVENT_ENTRIES_MAX = 512


class Happening(Enum):
    """An event's name, with NVMe's event type (Base 2.1, Persistent Event Log)."""

    POWER_ON = 0x04
    FORMAT_START = 0x07
    FORMAT_COMPLETION = 0x08
    SET_FEATURE = 0x0B
    THERMAL_EXCURSION = 0x0D
    POWER_OFF = "power_off"  # from here on vendor specific events, DEh
    UNSAFE_SHUTDOWN = "unsafe_shutdown"
    PROGRAM_LOAD = "program_load"
    PROGRAM_UNLOAD = "program_unload"
    PROGRAM_ACTIVATION = "program_activation"
    MEDIA_ERROR = "media_error"
    BAD_BLOCKS = "bad_blocks"
    SPARE_BELOW_THRESHOLD = "spare_below_threshold"
    READ_ONLY = "read_only"
    FAULT_SWITCHED = "fault_switched"
    LOG_DAMAGED = "log_damaged"

    @property
    def type(self) -> int:
        return self.value if isinstance(self.value, int) else _VENDOR


_VENDOR = 0xDE


@dataclass(frozen=True, slots=True)
class EventEntry:
    """One event. `event_number` counts from 1 over the drive's life."""

    event_number: int
    event_type: int
    event: str
    power_cycle: int
    at_ns: int  # drive clock of that power cycle
    power_on_ns: int  # of the drive's life
    detail: dict[str, Any]


class EventLog:
    """The newest events, newest first; each is written to the folder as it happens."""

    def __init__(self, folder: LogFolder) -> None:
        self._folder = folder
        self.entries: deque[EventEntry] = deque(maxlen=EVENT_ENTRIES_MAX)
        self.event_count = 0
        for record in folder.records:
            if record.get("log") == "event":
                self._restore(record)

    def add(
        self, event: Happening, *, power_cycle: int, at_ns: int, power_on_ns: int, **detail: Any
    ) -> None:
        self.event_count += 1
        entry = EventEntry(
            self.event_count,
            event.type,
            event.name.lower(),
            power_cycle,
            at_ns,
            power_on_ns,
            detail,
        )
        self.entries.appendleft(entry)
        self._folder.append({"log": "event", **asdict(entry)})

    def report(self) -> dict[str, Any]:
        """A JSON object: `total_number_of_events` and `events`, newest first."""
        return {
            "total_number_of_events": self.event_count,
            "events": [asdict(entry) for entry in self.entries],
        }

    def records(self) -> list[dict[str, Any]]:
        """What the folder should keep, oldest first."""
        return [{"log": "event", **asdict(entry)} for entry in reversed(self.entries)]

    def _restore(self, record: dict[str, Any]) -> None:
        """Takes over one that was written before; another version's is passed over."""
        names = {field.name for field in fields(EventEntry)}
        if set(record) != names | {"log"} or not isinstance(record["event_number"], int):
            return
        self.entries.appendleft(EventEntry(**{name: record[name] for name in names}))
        self.event_count = max(self.event_count, record["event_number"])
