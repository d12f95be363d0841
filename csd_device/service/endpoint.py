"""The controller's end of a queue pair, without a network: entries in, completion entries out.

    endpoint = Endpoint(drive)
    session = endpoint.open()
    session.handle(entry)          first a Connect, then commands
    for completion in session.take(): ...
    session.close()                the queue pair ends, its host's leases come back

A session never waits and starts nothing: who calls it decides when. `servicer` does so for gRPC,
and a host in the same process (tests, simulations) through its own in-process link.
"""

from csd_device.clock import TimeMode
from csd_device.drive import Drive
from csd_device.errors import CommandError
from csd_device.firmware.queue_pair import QueuePair
from csd_device.nand.faults import PowerCut
from csd_device.service import translate
from csd_protocol import PROTOCOL_MAJOR, PROTOCOL_MINOR
from csd_protocol.csd.v1 import csd_pb2 as pb
from csd_protocol.opcodes import AdminOpcode
from csd_protocol.status import Status

_SQ_HEAD_MODULUS = 1 << 16


class Endpoint:
    """Opens sessions on one drive."""

    def __init__(self, drive: Drive) -> None:
        self._drive = drive

    @property
    def holds_completions(self) -> bool:
        """Whether completions become due later, so that somebody has to wait for them."""
        return self._drive.time_mode is TimeMode.WALL

    def open(self) -> "Session":
        return Session(self._drive)


class Session:
    """One stream: a queue pair once Connect has succeeded."""

    def __init__(self, drive: Drive) -> None:
        self._drive = drive
        self._queue: QueuePair | None = None
        self._ready: list[pb.CompletionEntry] = []
        self._completed = 0
        self.ended = False

    def handle(self, entry: pb.SubmissionEntry) -> None:
        """Takes one entry. What is wrong with it becomes a completion; never raises for that.

        A drive without power completes nothing: its sessions end.
        """
        if self._drive.is_off:
            self.ended = True
            return
        try:
            if entry.set == pb.COMMAND_SET_ADMIN and entry.opcode == AdminOpcode.CONNECT:
                self._connect(entry)
            else:
                self._submit(entry)
        except CommandError as error:
            self._ready.append(translate.refusal(entry.cid, error.status, error.detail))
        except PowerCut:
            self.ended = True

    def take(self) -> list[pb.CompletionEntry]:
        """What is due by now, in the order of completion times."""
        taken, self._ready = self._ready, []
        if self._queue is not None:
            now_ns = self._drive.clock.now_ns()
            for completion in self._queue.pop_due(now_ns):
                done_ns = completion.timing.done_ns
                late_ns = max(0, now_ns - done_ns) if self._is_wall else 0
                taken.append(translate.entry_of(completion, 0, late_ns))
        for completion_entry in taken:
            self._completed = (self._completed + 1) % _SQ_HEAD_MODULUS
            completion_entry.sq_head = self._completed
        return taken

    @property
    def wait_ns(self) -> int | None:
        """How long until something can be taken: 0 when it is due; None when nothing is coming."""
        if self._ready:
            return 0
        due_ns = self._queue.next_due_ns() if self._queue else None
        return None if due_ns is None else max(0, due_ns - self._drive.clock.now_ns())

    def close(self) -> None:
        """Ends the queue pair; its host's leases come back with the host's last one."""
        self.ended = True
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.close()

    @property
    def _is_wall(self) -> bool:
        return self._drive.time_mode is TimeMode.WALL

    def _connect(self, entry: pb.SubmissionEntry) -> None:
        if self._queue is not None:
            raise CommandError(Status.SEQUENCE_ERROR, "this queue pair is connected already")
        asked = entry.connect
        try:
            _check_version(asked.protocol_major, asked.protocol_minor)
            queue = self._drive.connect(asked.host_name, asked.host_id, asked.queue_depth)
        except CommandError:
            self.ended = True
            raise
        self._queue = queue
        result = pb.ConnectResult(
            protocol_major=PROTOCOL_MAJOR,
            protocol_minor=PROTOCOL_MINOR,
            queue_depth=queue.depth,
            queue_id=queue.queue_id,
            window_path=str(self._drive.window_path),
            window_bytes=self._drive.window_bytes,
        )
        self._ready.append(pb.CompletionEntry(cid=entry.cid, connect=result))

    def _submit(self, entry: pb.SubmissionEntry) -> None:
        if self._queue is None:
            self.ended = True
            raise CommandError(Status.SEQUENCE_ERROR, "the first entry of a stream is Connect")
        if entry.cid > translate.CID_MAX:
            raise CommandError(Status.INVALID_FIELD, f"CID {entry.cid} is more than 16 bits")
        command = translate.command_of(entry)
        self._queue.submit(entry.cid, command, self._drive.clock.now_ns())


def _check_version(major: int, minor: int) -> None:
    """A host with another major version is refused; minor versions only add."""
    if major != PROTOCOL_MAJOR:
        raise CommandError(
            Status.PROTOCOL_VERSION,
            f"the host speaks protocol {major}.{minor}, this drive {PROTOCOL_MAJOR}."
            f"{PROTOCOL_MINOR}: install the same version on both sides",
        )
