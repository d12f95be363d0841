"""Asynchronous events: requests that wait on each queue pair until the drive has something to say.

As in NVMe, an event is told once to each queue pair, then masked there until that host reads the
log page that it names.
"""

from dataclasses import dataclass, field

from csd_device.firmware.commands import AsyncEventResult
from csd_protocol.opcodes import LogPage

REQUESTS_MAX = 4
RELIABILITY = AsyncEventResult(type=1, info=0, log_id=LogPage.SMART)


@dataclass(slots=True)
class EventRequests:
    """One queue pair's waiting requests, and what it was not told yet."""

    waiting: list[int] = field(default_factory=list)  # CIDs, oldest first
    _untold: AsyncEventResult | None = None
    _masked: bool = False

    @property
    def is_full(self) -> bool:
        return len(self.waiting) >= REQUESTS_MAX

    def raise_event(self, event: AsyncEventResult) -> None:
        """There is something to say; once, however often, until the host reads the log page."""
        if not self._masked:
            self._untold = event
            self._masked = True

    def take(self) -> tuple[int, AsyncEventResult] | None:
        """The request to complete now and its event, if there are both."""
        if self._untold is None or not self.waiting:
            return None
        event, self._untold = self._untold, None
        return self.waiting.pop(0), event

    def unmask(self, log_id: int) -> None:
        """The host read this log page."""
        if log_id == RELIABILITY.log_id:
            self._masked = False
            self._untold = None
