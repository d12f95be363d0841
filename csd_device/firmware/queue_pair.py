"""A queue pair without a transport: commands go in as they arrive, completions come out when due.

A command is carried out when it is submitted: its data is where it belongs at once, and its
completion waits here until the time that the model gave it. So what Abort can stop is the
completion; the leases that it would have told of go back.
"""

from heapq import heappop, heappush

from csd_device.clock import TimeMode
from csd_device.errors import CommandError
from csd_device.firmware.commands import (
    Abort,
    AsyncEvent,
    Command,
    Completion,
    Dword0,
    MediaError,
    Result,
    StageResult,
    Timing,
)
from csd_device.firmware.context import Context
from csd_device.firmware.controller import Controller
from csd_device.firmware.dispatch import dispatch, note_failure
from csd_device.firmware.events import EventRequests
from csd_device.firmware.hosts import Host
from csd_device.firmware.modelled_time import CommandTime
from csd_device.firmware.unreadable import UnitsUnreadable
from csd_protocol.status import Status

CID_MAX = 0xFFFF
_NOT_ABORTED = 1  # bit 0 of an Abort's result


class QueuePair:
    """One host's queue pair of at most `depth` commands."""

    def __init__(self, controller: Controller, host: Host, queue_id: int, depth: int) -> None:
        """Made by `Drive.connect`."""
        self.queue_id = queue_id
        self.depth = depth
        self.completed = 0  # completions popped so far
        self._controller = controller
        self._host = host
        self._events = controller.events[queue_id] = EventRequests()
        self._pending: dict[int, Completion] = {}  # by CID
        self._due: list[tuple[int, int, int, Completion]] = []  # heap: due, done, sequence
        self._refused: list[Completion] = []  # never got a place in the queue
        self._sequence = 0
        self._closed = False

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def in_flight(self) -> int:
        """Commands submitted and not popped yet, event requests among them."""
        return len(self._pending) + len(self._events.waiting)

    def submit(self, cid: int, command: Command, arrival_ns: int) -> None:
        """Takes one command; whatever comes of it is a completion.

        A queue that is full and a CID that is in flight are completions too, posted at once. Pop
        between submissions, or refused ones pile up.
        """
        assert not self._closed
        refusal = self._refusal(cid)
        if refusal is not None:
            self._refuse(cid, refusal, command, arrival_ns)
        elif isinstance(command, AsyncEvent):
            self._await_event(cid, arrival_ns)
        else:
            self._carry_out(cid, command, arrival_ns)

    def next_due_ns(self) -> int | None:
        """When the next completion is due on the drive's clock; None when none is on its way."""
        self._tell_events(0)
        if self._refused:
            return 0
        self._drop_replaced()
        return self._due[0][0] if self._due else None

    def pop_due(self, now_ns: int) -> list[Completion]:
        """Completions due by now, in the order of their modelled times.

        In virtual time the clock moves on to the last of them.
        """
        self._tell_events(now_ns)
        popped, self._refused = self._refused, []
        while self._due and self._due[0][0] <= now_ns:
            completion = heappop(self._due)[3]
            if self._pending.get(completion.cid) is completion:
                del self._pending[completion.cid]
                popped.append(completion)
        self.completed += len(popped)
        if popped and self._controller.time_mode is TimeMode.VIRTUAL:
            self._controller.clock.advance_to(max(item.timing.done_ns for item in popped))
        return popped

    def close(self) -> None:
        """Ends the queue pair: what was not popped is undone as by Abort.

        Leases and residency go back with the host's last queue pair.
        """
        if self._closed:
            return
        self._closed = True
        for completion in self._pending.values():
            self._give_back(completion)
        self._pending.clear()
        self._due.clear()
        self._events.waiting.clear()
        del self._controller.events[self.queue_id]
        self._controller.hosts.detach(self._host, self._controller.stager.window)

    def _refusal(self, cid: int) -> CommandError | None:
        """Why this CID gets no place in the queue, if so."""
        if not 0 <= cid <= CID_MAX:
            return CommandError(Status.INVALID_FIELD, f"CID {cid}; they go from 0 to {CID_MAX}")
        if cid in self._pending or cid in self._events.waiting:
            return CommandError(Status.CID_CONFLICT, f"CID {cid} is in flight on this queue")
        if self.in_flight >= self.depth:
            return CommandError(
                Status.QUEUE_FULL, f"{self.in_flight} commands are in flight; depth {self.depth}"
            )
        return None

    def _refuse(self, cid: int, error: CommandError, command: Command, now_ns: int) -> None:
        self._log(cid, error, command, now_ns)
        self._refused.append(_failed(cid, error, self._instant(now_ns)))

    def _carry_out(self, cid: int, command: Command, arrival_ns: int) -> None:
        controller = self._controller
        time = CommandTime(controller.time, arrival_ns)
        try:
            result = self._execute(command, time)
        except CommandError as error:
            self._log(cid, error, command, arrival_ns)
            completion = _failed(cid, error, time.timing())
        else:
            completion = Completion(cid, Status.SUCCESS, time.timing(), result)
        controller.counters.busy_ns += time.now_ns - arrival_ns
        self._post(completion, arrival_ns)

    def _execute(self, command: Command, time: CommandTime) -> Result:
        if isinstance(command, Abort):
            return self._abort(command.cid, time.now_ns)
        return dispatch(Context(self._controller, self._host, self._events, time), command)

    def _abort(self, cid: int, now_ns: int) -> Dword0:
        """Completes another command of this queue as aborted, unless its completion was popped."""
        before = self._pending.pop(cid, None)
        if before is not None:
            self._give_back(before)
        elif cid in self._events.waiting:
            self._events.waiting.remove(cid)
        else:
            return Dword0(_NOT_ABORTED)
        self._controller.counters.aborted_commands += 1
        error = CommandError(Status.ABORT_REQUESTED, "aborted by the host")
        self._post(_failed(cid, error, self._instant(now_ns)), now_ns)
        return Dword0(0)

    def _await_event(self, cid: int, now_ns: int) -> None:
        if self._events.is_full:
            error = CommandError(
                Status.ASYNC_EVENT_LIMIT, f"{len(self._events.waiting)} requests wait already"
            )
            self._log(cid, error, AsyncEvent(), now_ns)
            self._post(_failed(cid, error, self._instant(now_ns)), now_ns)
        else:
            self._events.waiting.append(cid)

    def _tell_events(self, now_ns: int) -> None:
        told = self._events.take()
        if told is not None:
            cid, event = told
            self._post(Completion(cid, Status.SUCCESS, self._instant(now_ns), event), now_ns)

    def _post(self, completion: Completion, arrival_ns: int) -> None:
        held = self._controller.time_mode is TimeMode.WALL
        due_ns = completion.timing.done_ns if held else arrival_ns
        self._sequence += 1
        self._pending[completion.cid] = completion
        entry = (due_ns, completion.timing.done_ns, self._sequence, completion)
        heappush(self._due, entry)

    def _drop_replaced(self) -> None:
        """Drops heap entries whose completion an Abort replaced."""
        while self._due and self._pending.get(self._due[0][3].cid) is not self._due[0][3]:
            heappop(self._due)

    def _give_back(self, completion: Completion) -> None:
        if isinstance(completion.result, StageResult):
            self._controller.stager.give_back(self._host, completion.result.sites)

    def _instant(self, now_ns: int) -> Timing:
        """The timing of what takes no time; all zero with time off."""
        return CommandTime(self._controller.time, now_ns).timing()

    def _log(self, cid: int, error: CommandError, command: Command, now_ns: int) -> None:
        note_failure(
            self._controller,
            error,
            queue=self.queue_id,
            cid=cid,
            command=type(command).__name__,
            at_ns=now_ns,
        )


def _failed(cid: int, error: CommandError, timing: Timing) -> Completion:
    retryable = error.status.value.retryable
    lost = MediaError(error.lost) if isinstance(error, UnitsUnreadable) else None
    return Completion(cid, error.status, timing, lost, error.detail, not retryable)
