"""What the drive does between commands: it moves data ahead of need, while the flash is idle.

Nothing runs beside the commands. When one arrives, the time since the flash last worked is looked
at: what fits into it is done then and booked at the time that has passed. So a drive that is left
alone finds its room made, and one that is never left alone pays for it with its writes. A step that
has begun is finished, and the command waits for it where they meet.
"""

from csd_device.firmware.modelled_time import CommandTime, DriveTime
from csd_device.ftl import Ftl

IDLE_AFTER_NS = 1_000_000  # of idle flash before background work begins; assumed
STEP_SECTORS = 256
STEPS_MAX = 64  # between two commands: bounds what a command after a long pause waits for


class IdleWork:
    """Of one drive. Without modelled time there is no idle time, and only writes collect."""

    def __init__(self, ftl: Ftl, time: DriveTime | None) -> None:
        self._ftl = ftl
        self._time = time
        self._arrived_ns = 0  # of the command before

    def use_time_until(self, now_ns: int) -> None:
        """A command arrives now: does what the time before it was enough for."""
        self._ftl.pass_time(now_ns)
        was_long = now_ns - self._arrived_ns > IDLE_AFTER_NS
        self._arrived_ns = now_ns
        if self._time is None or not was_long:
            return
        at_ns = self._time.nand.idle_ns() + IDLE_AFTER_NS
        for _ in range(STEPS_MAX):
            programs = self._ftl.work_idle(STEP_SECTORS) if at_ns < now_ns else None
            if programs is None:
                return
            step = CommandTime(self._time, at_ns)
            step.work_in_background(programs)
            at_ns = step.now_ns
