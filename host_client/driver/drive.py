"""`Drive`: a computational storage drive as the rest of the host sees it."""

import json
import logging
import os
import socket
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import numpy as np

from csd_protocol.address import parse_address
from csd_protocol.csd.v1 import csd_pb2 as pb
from csd_protocol.opcodes import Cns, Feature
from host_client.driver import entries
from host_client.driver.commands import (
    F32,
    NOTHING_TOLD,
    U32,
    AsyncEvent,
    Residency,
    Staged,
    StageTarget,
    Told,
)
from host_client.driver.embedded import Daemon
from host_client.driver.entries import Command
from host_client.driver.errors import DriveError, DriveLost, DriveUnavailable, QueueFull
from host_client.driver.link import GrpcLink, Link
from host_client.driver.queue_pair import PendingCommand, QueuePair

_LOG = logging.getLogger(__name__)

_PROGRAM_CHUNK_BYTES = 1 << 20
_TRANSFERS_IN_FLIGHT = 4
_COPY_BYTES = 4 << 20  # of one Copy, so that a drive is not held up by it
_ALIVE_TIMEOUT_S = 1.0
_LOG_PIECE_BYTES = 1 << 20
TRACE_SPANS = 200_000  # that a trace keeps unless told otherwise

T = TypeVar("T")
TimeMode = Literal["wall", "virtual", "off"]
PendingStage = PendingCommand[Staged]


class Drive:
    """A connected drive; a context manager. Thread-safe.

    Methods raise CommandFailed (the drive said no), DriveLost (it is gone; see `reconnect`),
    DriveTimeout and QueueFull. Those that return a PendingCommand raise them from `result()`.
    """

    def __init__(self, link: Link, *, queue_depth: int = 0, timeout_s: float = 60.0) -> None:
        """Opens a queue pair over `link`, which the drive then owns.

        `queue_depth` 0 takes the controller's maximum; `timeout_s` is how long a command may take.
        """
        self.host_id = uuid.uuid4().hex
        self.release_errors = 0
        self._link = link
        self._queue_depth = queue_depth
        self._timeout_s = timeout_s
        self._daemon: Daemon | None = None
        self._residency: dict[int, dict[int, Residency]] = {}
        self._tellers: dict[int, object] = {}
        self._event: PendingCommand[AsyncEvent] | None = None
        self._open()

    @classmethod
    def connect(cls, address: str, *, queue_depth: int = 0, timeout_s: float = 60.0) -> Self:
        """`address`: `unix:PATH`, `tcp:HOST:PORT` or `HOST:PORT`.

        Raises ValueError for another form and DriveUnavailable when nothing answers there.
        """
        link = GrpcLink(parse_address(address))
        try:
            return cls(link, queue_depth=queue_depth, timeout_s=timeout_s)
        except DriveLost as error:
            link.close()
            raise DriveUnavailable(f"no drive answers at {address}: {error.reason}") from None
        except DriveError:
            link.close()
            raise

    @classmethod
    def embedded(
        cls,
        media: Path | None = None,
        *,
        drive: str = "edge-gen5",
        time: TimeMode = "off",
        start_timeout_s: float = 60.0,
        timeout_s: float = 60.0,
    ) -> Self:
        """A drive with a daemon of its own, which ends with `close` or with this process.

        `media` None is `embedded_media_path(drive)`. Raises DriveUnavailable when the daemon does
        not come up within `start_timeout_s`, with what it said.
        """
        daemon = Daemon.start(media or embedded_media_path(drive), drive, time, start_timeout_s)
        try:
            connected = cls.connect(daemon.address, timeout_s=timeout_s)
        except DriveError:
            daemon.stop()
            raise
        connected._daemon = daemon
        return connected

    # ---- what it is --------------------------------------------------------------------------

    @property
    def address(self) -> str:
        return self._link.address

    @property
    def daemon_pid(self) -> int | None:
        """Process of an embedded drive's daemon."""
        return self._daemon.pid if self._daemon else None

    @property
    def window_path(self) -> str:
        """The window's shared file, as the daemon sees it."""
        return self._queue.connected.window_path

    @property
    def window_bytes(self) -> int:
        return self._queue.connected.window_bytes

    @property
    def queue_depth(self) -> int:
        """Commands that can be in flight at once."""
        return self._queue.depth

    def identify(self, cns: Cns) -> dict[str, Any]:
        return self._call(entries.identify(cns))

    def log_page(self, log_id: int) -> dict[str, Any]:
        """A page as the JSON object that it is (docs/TELEMETRY.md). It is read in pieces."""
        page = b""
        while True:
            part = entries.get_log_page(log_id, len(page), _LOG_PIECE_BYTES)
            data = self._queue.submit(part, entries.data_of).result()
            page += data
            if len(data) < _LOG_PIECE_BYTES:
                break
        answer: dict[str, Any] = json.loads(page)
        return answer

    def set_feature(self, feature: Feature, value: int) -> None:
        self._queue.submit(entries.set_feature(feature, value), entries.nothing).result()

    def get_feature(self, feature: Feature) -> int:
        return self._queue.submit(entries.get_feature(feature), entries.dword0_of).result()

    def wait_event(self, timeout_s: float | None = None) -> AsyncEvent | None:
        """The next asynchronous event; None when there is none within `timeout_s`.

        The request stays with the drive between calls, so no event is missed. An event of the
        same type comes again only after its log page was read.
        """
        if self._event is None:
            self._event = self._queue.submit(entries.async_event(), entries.event_of)
        if not self._event.wait(timeout_s):
            return None
        told, self._event = self._event, None
        return told.result()

    @contextmanager
    def traced(self, spans_max: int = TRACE_SPANS) -> Iterator[None]:
        """The drive records what it does, meanwhile. `log_page(LogPage.TRACE)` has it then.

        Raises CommandFailed for a drive with time off: nothing is modelled there.
        """
        self.set_feature(Feature.TRACE, spans_max)
        try:
            yield
        finally:
            with suppress(DriveLost):
                self.set_feature(Feature.TRACE, 0)

    def faults(self) -> dict[str, Any]:
        """The settings of each fault (None: off), their seed, and `counters` of what they did."""
        return self._call(entries.get_faults())

    def set_faults(
        self, name: str, settings: Mapping[str, Any] | None, seed: int | None = None
    ) -> None:
        """Switches one fault on with these settings, or off (None). docs/FAULTS.md has them.

        `seed` is shared by all faults; None leaves it. Others go on as they were.
        """
        change: dict[str, Any] = {"name": name, "settings": settings}
        if seed is not None:
            change["seed"] = seed
        self._queue.submit(entries.set_faults(change), entries.nothing).result()

    def clear_faults(self) -> None:
        """Switches all faults off."""
        self._queue.submit(entries.set_faults({}), entries.nothing).result()

    def alive(self) -> bool:
        """Whether the drive answers within a second."""
        try:
            pending = self._queue.submit(entries.keep_alive(), entries.nothing, _ALIVE_TIMEOUT_S)
            pending.result(_ALIVE_TIMEOUT_S)
        except DriveError:
            return False
        return True

    # ---- blocks ------------------------------------------------------------------------------

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Any range of the namespace; whole blocks move. Never-written blocks read as zeroes."""
        first = offset_bytes // self.block_bytes
        stop = -(-(offset_bytes + length_bytes) // self.block_bytes)
        step = self.transfer_bytes_max // self.block_bytes
        commands = (
            entries.read(start, min(step, stop - start)) for start in range(first, stop, step)
        )
        data = b"".join(self._pipelined(commands, entries.data_of))
        skip = offset_bytes - first * self.block_bytes
        return data[skip : skip + length_bytes]

    def write(
        self, offset_bytes: int, data: bytes | bytearray | memoryview, fua: bool = False
    ) -> None:
        """Whole blocks. Each block is old or new after a crash; durable after `flush` or `fua`.

        Raises ValueError when offset or length is not a multiple of `block_bytes`.
        """
        view = memoryview(data).cast("B")
        self._check_aligned(offset_bytes, len(view))
        slba, step = offset_bytes // self.block_bytes, self.transfer_bytes_max
        commands = (
            entries.write(slba + start // self.block_bytes, bytes(view[start : start + step]), fua)
            for start in range(0, len(view), step)
        )
        for _ in self._pipelined(commands, entries.nothing):
            pass

    def copy(self, from_bytes: int, to_bytes: int, length_bytes: int) -> None:
        """Whole blocks to another place, inside the drive. The two runs must not overlap."""
        self._check_aligned(from_bytes, length_bytes)
        self._check_aligned(to_bytes, length_bytes)
        source, target = from_bytes // self.block_bytes, to_bytes // self.block_bytes
        count = length_bytes // self.block_bytes
        step = _COPY_BYTES // self.block_bytes
        commands = (
            entries.copy(source + start, target + start, min(step, count - start))
            for start in range(0, count, step)
        )
        for _ in self._pipelined(commands, entries.nothing):
            pass

    def flush(self) -> None:
        """What was written before is durable when this returns."""
        self._queue.submit(entries.flush(), entries.nothing).result()

    def deallocate(self, offset_bytes: int, length_bytes: int) -> None:
        """The drive may forget these whole blocks; they read as zeroes."""
        self._check_aligned(offset_bytes, length_bytes)
        slba, blocks = offset_bytes // self.block_bytes, length_bytes // self.block_bytes
        self._queue.submit(entries.deallocate(slba, blocks), entries.nothing).result()

    # ---- programs ----------------------------------------------------------------------------

    def load_program(self, program: int, data: bytes, activate: bool = True) -> None:
        """Loads a program file (csd_protocol.program_file) under an identifier, 0 to 255."""
        commands = (
            entries.load_program(
                program, len(data), start, data[start : start + _PROGRAM_CHUNK_BYTES]
            )
            for start in range(0, len(data), _PROGRAM_CHUNK_BYTES)
        )
        for _ in self._pipelined(commands, entries.nothing):
            pass
        if activate:
            self.activate_program(program)

    def activate_program(self, program: int, active: bool = True) -> None:
        self._queue.submit(entries.activate_program(program, active), entries.nothing).result()

    def unload_program(self, program: int) -> None:
        self._queue.submit(entries.unload_program(program), entries.nothing).result()

    def programs(self) -> list[dict[str, Any]]:
        """What is loaded: program, kind, model, role, bytes, active, layers of each."""
        listed: list[dict[str, Any]] = self.identify(Cns.PROGRAMS)["programs"]
        return listed

    def execute_program(
        self,
        program: int,
        model: int,
        layer: int,
        hidden: F32,
        keep: float,
        told: Told = NOTHING_TOLD,
        token: int = 0,
    ) -> PendingCommand[U32]:
        """The units the program names for `hidden` float32 [rows, hidden], ascending uint32.

        `token` is the position of row 0.
        """
        command = entries.execute_program(program, model, layer, hidden, keep, told, token)
        return self._queue.submit(command, entries.units_of)

    def correct(
        self, program: int, model: int, layer: int, inputs: F32, computed: U32
    ) -> PendingCommand[F32]:
        """What the layer's units that were not computed add, float32 of the shape of `inputs`.

        `inputs` float32 [rows, hidden] are the FFN's own, so behind the RMSNorm; `computed` are
        the units that the host computed itself, ascending.
        """
        command = entries.correct(program, model, layer, inputs, computed)
        return self._queue.submit(
            command, lambda completion: entries.values_of(completion).reshape(inputs.shape)
        )

    # ---- staging -----------------------------------------------------------------------------

    def set_residency(
        self, model: int, sites: Mapping[int, Residency], teller: object = None
    ) -> None:
        """Says what this host holds of each site named (bool [units], True for all, False: none).

        Other sites keep what was said before. Said again by `reconnect`. There is one residency a
        host and model; `teller` is who speaks, for those who share the drive (`told_by`).
        """
        self._tellers[model] = teller
        self._queue.submit(entries.host_residency(model, sites), entries.nothing).result()
        copies = {
            site: held.copy() if isinstance(held, np.ndarray) else held
            for site, held in sites.items()
        }
        self._residency.setdefault(model, {}).update(copies)

    def told_by(self, model: int) -> object:
        """Who spoke last of what this host holds of a model."""
        return self._tellers.get(model)

    def predict_and_stage(
        self,
        model: int,
        program: int,
        token: int,
        hidden: F32,
        targets: Iterable[StageTarget],
        release: Iterable[int] = (),
        told: Told = NOTHING_TOLD,
    ) -> PendingStage:
        """A program chooses units by `hidden` float32 [rows, hidden]; the drive stages them.

        `token` is the position of row 0. `release` gives leases back on the way, which saves a
        command; so does what the program is `told`.
        """
        command = entries.predict_and_stage(model, program, token, hidden, targets, release, told)
        return self._queue.submit(command, entries.staged_of)

    def stage(
        self, model: int, targets: Iterable[StageTarget], release: Iterable[int] = ()
    ) -> PendingStage:
        """Stages named units, or all of a site, without a program. `release` as above."""
        return self._queue.submit(entries.stage(model, targets, release), entries.staged_of)

    def release(self, leases: Iterable[int]) -> None:
        """Gives leases back without waiting; failures are counted in `release_errors` and logged.

        Raises DriveLost when the drive is known to be gone.
        """
        wanted = [lease for lease in leases if lease]
        if not wanted:
            return
        pending = self._queue.submit(entries.release(wanted), entries.nothing)
        pending.add_done_callback(self._note_release)

    # ---- life --------------------------------------------------------------------------------

    def reconnect(self) -> None:
        """A new queue pair to the same address, and the residency said again.

        The host is the same one to the drive. Leases from before are gone: their queue pair ended.
        Raises DriveUnavailable when nothing answers.
        """
        self._queue.close()
        self._event = None
        try:
            self._open()
        except DriveLost as error:
            raise DriveUnavailable(f"no drive answers at {self.address}: {error.reason}") from None
        for model, sites in self._residency.items():
            self._queue.submit(entries.host_residency(model, sites), entries.nothing).result()

    def close(self) -> None:
        """Ends the queue pair, and the daemon of an embedded drive. Again: does nothing."""
        self._queue.close()
        self._link.close()
        if self._daemon is not None:
            self._daemon.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> None:
        host_name = f"{socket.gethostname()}/{os.getpid()}"
        self._queue = QueuePair(
            self._link, host_name, self.host_id, self._queue_depth, self._timeout_s
        )
        try:
            namespace = self.identify(Cns.NAMESPACE)
            controller = self.identify(Cns.CONTROLLER)
        except DriveError:
            self._queue.close()
            raise
        self.block_bytes: int = namespace["block_bytes"]
        self.capacity_bytes: int = namespace["capacity_bytes"]
        self.transfer_bytes_max: int = controller["mdts_bytes"]

    def _call(self, command: Command) -> dict[str, Any]:
        answer: dict[str, Any] = self._queue.submit(command, entries.json_of).result()
        return answer

    def _pipelined(
        self, commands: Iterable[Command], interpret: Callable[[pb.CompletionEntry], T]
    ) -> Iterator[T]:
        """Answers in order, a few commands in flight: room and memory for others stay free."""
        in_flight: deque[PendingCommand[T]] = deque()
        for command in commands:
            if len(in_flight) == _TRANSFERS_IN_FLIGHT:
                yield in_flight.popleft().result()
            in_flight.append(self._queue.submit(command, interpret))
        while in_flight:
            yield in_flight.popleft().result()

    def _check_aligned(self, offset_bytes: int, length_bytes: int) -> None:
        if offset_bytes % self.block_bytes or length_bytes % self.block_bytes:
            raise ValueError(
                f"{length_bytes} bytes at {offset_bytes}: the drive works in whole blocks of "
                f"{self.block_bytes} bytes"
            )

    def _note_release(self, pending: PendingCommand[None]) -> None:
        try:
            pending.result()
        except (DriveError, QueueFull) as error:
            self.release_errors += 1
            _LOG.warning("%s", error)


def embedded_media_path(drive: str) -> Path:
    """Where an embedded drive of this kind keeps its media."""
    return cache_folder() / f"{drive}.csd"


def cache_folder() -> Path:
    """What is ours of the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "csd"
