"""Asynchronous events: requests that wait on each queue pair until the drive has something to say.

As in NVMe, an event is told once to each queue pair; further ones of its type are then masked there
until that host reads the log page that it names.
"""

from dataclasses import dataclass, field

from csd_device.firmware.commands import AsyncEventResult
from csd_protocol.opcodes import LogPage

REQUESTS_MAX = 4
_ERROR, _SMART = 0, 1  # event types
WRITE_ERROR = AsyncEventResult(type=_ERROR, info=4, log_id=LogPage.ERROR)  # transient internal
RELIABILITY = AsyncEventResult(type=_SMART, info=0, log_id=LogPage.SMART)
TEMPERATURE = AsyncEventResult(type=_SMART, info=1, log_id=LogPage.SMART)
SPARE = AsyncEventResult(type=_SMART, info=2, log_id=LogPage.SMART)


@dataclass(slots=True)
class EventRequests:
    """One queue pair's waiting requests, and what it was not told yet."""

    waiting: list[int] = field(default_factory=list)  # CIDs, oldest first
    _untold: list[AsyncEventResult] = field(default_factory=list)  # one a type at most
    _masked: set[int] = field(default_factory=set)  # log pages that clear their type's mask

    @property
    def is_full(self) -> bool:
        return len(self.waiting) >= REQUESTS_MAX

    def raise_event(self, event: AsyncEventResult) -> None:
        """There is something to say; once a type, until the host reads the log page."""
        if event.log_id not in self._masked:
            self._masked.add(event.log_id)
            self._untold.append(event)

    def take(self) -> tuple[int, AsyncEventResult] | None:
        """The request to complete now and its event, if there are both."""
        if not self._untold or not self.waiting:
            return None
        return self.waiting.pop(0), self._untold.pop(0)

    def unmask(self, log_id: int) -> None:
        """The host read this log page."""
        self._masked.discard(log_id)
        self._untold = [event for event in self._untold if event.log_id != log_id]
