"""One queue pair: commands in flight by CID, a bounded depth, timeouts, and retries.

Why it looks like this. The free CIDs lie in a queue: taking one is at once the choice of a CID, the
bound on the depth and the wait for room. A pending command is woken through a bare lock, which
costs a third of a Condition. Completions are interpreted on the thread that asks for the result, so
the lane's thread only matches CIDs. Retried is what the drive completed with a status whose Do Not
Retry bit is clear, as such a command had no effect; one whose fate is unknown is never sent again.
"""

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from csd_protocol.csd.v1 import csd_pb2 as pb
from csd_protocol.status import Status, lookup
from host_client.driver import entries
from host_client.driver.commands import Timing
from host_client.driver.entries import Command
from host_client.driver.errors import DriveError, DriveLost, DriveTimeout, QueueFull
from host_client.driver.link import Link

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

_RETRIES_MAX = 4
_RETRY_FIRST_S = 0.002  # doubles with each attempt
_RETRY_LONGEST_S = 0.25
_WINDOW_RETRIES_MAX = 120  # some 30 s: a window that went away is waited for
_CLOSED = "closed by this host"
_NO_MORE = -1  # in the queue of free CIDs: the queue pair has ended


class PendingCommand(Generic[T]):
    """A command in flight. Any number of threads may wait for it."""

    def __init__(
        self, queue: "QueuePair", command: Command, interpret: Callable[[pb.CompletionEntry], T]
    ) -> None:
        self.command = command
        self.attempts = 1
        self.cid = _NO_MORE
        self.abandoned = False
        self._queue = queue
        self._interpret = interpret
        self._outcome: pb.CompletionEntry | DriveError | None = None
        self._gate = threading.Lock()
        self._gate.acquire()
        self._guard = threading.Lock()
        self._callbacks: list[Callable[[PendingCommand[T]], None]] = []

    def done(self) -> bool:
        return self._outcome is not None

    def result(self, timeout_s: float | None = None) -> T:
        """Waits for the completion, at most `timeout_s` (None: the queue pair's own timeout).

        Raises CommandFailed, DriveLost or DriveTimeout; after a timeout the command is aborted,
        and what it still stages is released.
        """
        if self._outcome is None:
            limit_s = self._queue.timeout_s if timeout_s is None else timeout_s
            if self._gate.acquire(timeout=limit_s):
                self._gate.release()
            elif self._queue.abandon(self):
                raise DriveTimeout(
                    f"{self.command.what}: not completed by the drive at "
                    f"{self._queue.address} within {limit_s:g} s; abort requested"
                )
        if isinstance(self._outcome, DriveError):
            raise self._outcome
        assert self._outcome is not None
        failed = entries.failure(self.command.what, self._outcome)
        if failed is not None:
            raise failed
        return self._interpret(self._outcome)

    @property
    def timing(self) -> Timing:
        """Where its modelled time went, once `result` was had."""
        assert isinstance(self._outcome, pb.CompletionEntry)
        return entries.timing_of(self._outcome)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits for the completion, and leaves the command in flight when it does not come."""
        if self._outcome is None and self._gate.acquire(
            timeout=-1 if timeout_s is None else timeout_s
        ):
            self._gate.release()
        return self._outcome is not None

    def add_done_callback(self, callback: Callable[["PendingCommand[T]"], None]) -> None:
        """Calls it with this command once done, on the lane's thread, or at once if it is done.

        A callback must neither block nor raise.
        """
        with self._guard:
            if self._outcome is None:
                self._callbacks.append(callback)
                return
        callback(self)

    def settle(self, outcome: pb.CompletionEntry | DriveError) -> None:
        """For the queue pair: the outcome is known."""
        with self._guard:
            self._outcome = outcome
            callbacks = self._callbacks
        self._gate.release()
        for callback in callbacks:
            callback(self)


class QueuePair:
    """Commands to one drive over one lane. Thread-safe.

    Raises DriveLost when the drive cannot be reached and CommandFailed when it refuses (another
    protocol version).
    """

    def __init__(
        self, link: Link, host_name: str, host_id: str, depth: int = 0, timeout_s: float = 60.0
    ) -> None:
        self.address = link.address
        self.timeout_s = timeout_s
        self._pending: dict[int, PendingCommand[Any]] = {}
        self._free: SimpleQueue[int] = SimpleQueue()
        self._lock = threading.Lock()
        self._lost_reason: str | None = None
        self._closing = False
        self._here = threading.local()  # .receiving: this thread must never wait for room
        # Never among the free ones: Connect's first, then kept so that a full queue can be aborted.
        self._reserved_cid = 0
        self._lane = link.open_lane(self._receive, self._lose)
        try:
            self.connected = self._connect(entries.connect(host_name, host_id, depth))
        except DriveError:
            self.close()
            raise
        self.depth = self._reserved_cid = self.connected.queue_depth - 1
        for cid in range(self.depth):
            self._free.put(cid)

    @property
    def lost_reason(self) -> str | None:
        """Why nothing can be submitted any more; None while the drive is there."""
        return self._lost_reason

    def submit(
        self,
        command: Command,
        interpret: Callable[[pb.CompletionEntry], T],
        room_timeout_s: float | None = None,
    ) -> PendingCommand[T]:
        """Sends a command; waits for room in the queue at most `room_timeout_s` (None: timeout_s).

        Raises DriveLost, and QueueFull when there was no room in time (on the lane's thread: at
        once, as nothing would make room while it waits).
        """
        pending = PendingCommand(self, command, interpret)
        self._send(self._take_cid(room_timeout_s), pending)
        return pending

    def abandon(self, pending: PendingCommand[T]) -> bool:
        """Nobody waits for it any more: asks the drive to abort it. False: it is done already."""
        with self._lock:
            if pending.done():
                return False
            pending.abandoned = True
            target = pending.cid
            can_abort = target != _NO_MORE and self._reserved_cid not in self._pending
        if can_abort:
            abort = PendingCommand(self, entries.abort(target), entries.nothing)
            self._send(self._reserved_cid, abort)
        return True

    def close(self) -> None:
        """Ends the queue pair; what is still pending fails with DriveLost."""
        self._closing = True
        self._lane.close()
        self._lose(_CLOSED)

    def _connect(self, command: Command) -> pb.ConnectResult:
        pending = PendingCommand(self, command, _connect_result)
        self._send(self._reserved_cid, pending)
        return pending.result()

    def _take_cid(self, room_timeout_s: float | None) -> int:
        limit_s = self.timeout_s if room_timeout_s is None else room_timeout_s
        try:
            if getattr(self._here, "receiving", False):
                cid = self._free.get_nowait()
            else:
                cid = self._free.get(timeout=limit_s)
        except Empty:
            raise QueueFull(
                f"{self.address}: all {self.depth} entries of the queue are in flight"
            ) from None
        if cid == _NO_MORE:
            self._free.put(_NO_MORE)
            raise DriveLost(self.address, self._lost_reason or _CLOSED)
        return cid

    def _send(self, cid: int, pending: PendingCommand[T]) -> None:
        pending.command.entry.cid = cid
        with self._lock:
            if self._lost_reason is not None:
                raise DriveLost(self.address, self._lost_reason)
            pending.cid = cid
            self._pending[cid] = pending
        self._lane.send(pending.command.entry)

    def _receive(self, completion: pb.CompletionEntry) -> None:
        self._here.receiving = True
        try:
            self._match(completion)
        finally:
            self._here.receiving = False

    def _match(self, completion: pb.CompletionEntry) -> None:
        with self._lock:
            pending = self._pending.pop(completion.cid, None)
            if pending is None:
                _LOG.warning("%s: completion of unknown CID %d", self.address, completion.cid)
                return
            pending.cid = _NO_MORE
        again = _may_retry(pending, completion)
        if completion.cid != self._reserved_cid:
            self._free.put(completion.cid)
        if again:
            self._retry(pending)
            return
        if pending.abandoned:
            self._give_back(completion)
        pending.settle(completion)

    def _retry(self, pending: PendingCommand[Any]) -> None:
        """Sends it again after a while; meanwhile it has no CID."""
        delay_s = min(_RETRY_FIRST_S * 2 ** (pending.attempts - 1), _RETRY_LONGEST_S)
        pending.attempts += 1
        timer = threading.Timer(delay_s, self._resubmit, [pending])
        timer.daemon = True
        timer.start()

    def _resubmit(self, pending: PendingCommand[Any]) -> None:
        try:
            self._send(self._take_cid(None), pending)
        except (DriveLost, QueueFull) as error:
            pending.settle(error)

    def _give_back(self, completion: pb.CompletionEntry) -> None:
        """Releases what a command staged that its caller no longer waits for."""
        leases = entries.leases_of(completion)
        if not leases:
            return
        try:
            self.submit(entries.release(leases), entries.nothing)
        except (DriveLost, QueueFull) as error:
            _LOG.warning("%s: leases %s stay with the drive: %s", self.address, leases, error)

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self._lost_reason is not None:
                return
            reason = _CLOSED if self._closing else reason
            self._lost_reason = reason
            stranded = list(self._pending.values())
            self._pending.clear()
        self._free.put(_NO_MORE)
        for pending in stranded:
            pending.settle(DriveLost(self.address, reason))


def _connect_result(completion: pb.CompletionEntry) -> pb.ConnectResult:
    return completion.connect


def _may_retry(pending: PendingCommand[Any], completion: pb.CompletionEntry) -> bool:
    status = completion.status
    is_window = lookup(status.sct, status.sc) is Status.WINDOW_UNAVAILABLE
    attempts_max = _WINDOW_RETRIES_MAX if is_window else _RETRIES_MAX
    if status.dnr or pending.abandoned or pending.attempts > attempts_max:
        return False
    return bool(status.sct or status.sc)
