"""How entries travel to a drive and back: over gRPC, or into a controller in this process.

A link opens lanes; a lane carries the entries of one queue pair. Completions come back on a thread
of the lane's own (gRPC) or on the thread that submits (in-process), through the two callables given
to `open_lane`. After `lost` was called, nothing more is received.
"""

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Protocol

import grpc

from csd_protocol.address import Address
from csd_protocol.csd.v1 import csd_pb2 as pb
from csd_protocol.csd.v1.csd_pb2_grpc import ControllerStub

Receive = Callable[[pb.CompletionEntry], None]
Lost = Callable[[str], None]

_CLOSE_TIMEOUT_S = 2.0
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),  # a daemon that came back is found soon
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


class Lane(Protocol):
    """Carries the entries of one queue pair."""

    def send(self, entry: pb.SubmissionEntry) -> None:
        """Hands over one entry; entries arrive in order. Never blocks on the drive over gRPC."""

    def close(self) -> None:
        """Ends the queue pair; the drive takes its leases back. Waits until that has been seen."""


class Link(Protocol):
    """A way to one drive."""

    @property
    def address(self) -> str: ...

    def open_lane(self, receive: Receive, lost: Lost) -> Lane: ...

    def close(self) -> None: ...


class GrpcLink:
    """A gRPC channel over a Unix socket or TCP."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._channel = grpc.insecure_channel(str(address), options=_CHANNEL_OPTIONS)

    @property
    def address(self) -> str:
        return str(self._address)

    def open_lane(self, receive: Receive, lost: Lost) -> Lane:
        return _GrpcLane(self._channel, receive, lost)

    def close(self) -> None:
        self._channel.close()


class _GrpcLane:
    """One stream. Its thread is a daemon thread: an open lane keeps no process from exiting."""

    def __init__(self, channel: grpc.Channel, receive: Receive, lost: Lost) -> None:
        self._outgoing: SimpleQueue[pb.SubmissionEntry | None] = SimpleQueue()
        self._receive, self._lost = receive, lost
        self._stream = ControllerStub(channel).QueuePair(self._entries())
        self._thread = threading.Thread(target=self._run, name="csd-lane", daemon=True)
        self._thread.start()

    def send(self, entry: pb.SubmissionEntry) -> None:
        self._outgoing.put(entry)

    def close(self) -> None:
        self._outgoing.put(None)
        if threading.current_thread() is self._thread:
            return
        self._thread.join(_CLOSE_TIMEOUT_S)
        self._stream.cancel()
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _entries(self) -> Iterator[pb.SubmissionEntry]:
        return iter(self._outgoing.get, None)

    def _run(self) -> None:
        reason = "the drive closed the queue pair"
        try:
            for completion in self._stream:
                self._receive(completion)
        except grpc.RpcError:
            reason = f"{self._stream.code().name}: {self._stream.details()}"
        self._outgoing.put(None)
        self._lost(reason)


class Session(Protocol):
    """One queue pair of a controller in this process."""

    def handle(self, entry: pb.SubmissionEntry) -> None: ...

    def take(self) -> list[pb.CompletionEntry]:
        """Completions that are due, in the order of their times."""

    @property
    def ended(self) -> bool:
        """Whether the controller refused the connection; nothing more will come."""

    def close(self) -> None: ...


class Endpoint(Protocol):
    """A controller in this process, such as `csd_device.service.endpoint.Endpoint`."""

    @property
    def holds_completions(self) -> bool:
        """Whether completions become due later (wall time): then somebody has to wait for them."""

    def open(self) -> Session: ...


class InProcessLink:
    """Straight into a controller of this process; time virtual or off, as nobody here waits.

    Raises ValueError for a controller in wall time.
    """

    def __init__(self, endpoint: Endpoint, address: str = "in-process") -> None:
        if endpoint.holds_completions:
            raise ValueError("a drive in wall time needs its daemon: use time virtual or off here")
        self.address = address
        self._endpoint = endpoint
        self._turn = threading.RLock()
        self._lanes: list[_InProcessLane] = []

    def open_lane(self, receive: Receive, lost: Lost) -> Lane:
        with self._turn:
            lane = _InProcessLane(self._endpoint.open(), receive, lost, self)
            self._lanes.append(lane)
        return lane

    def close(self) -> None:
        for lane in list(self._lanes):
            lane.close()

    def exchange(self, session: Session, entry: pb.SubmissionEntry) -> None:
        """One entry in; what it made due on any lane goes out, on the caller's thread."""
        with self._turn:
            session.handle(entry)
            due = [(lane, lane.session.take()) for lane in self._lanes]
        for lane, completions in due:
            lane.deliver(completions)

    def drop(self, lane: "_InProcessLane") -> bool:
        """Ends a lane's session; False when it had ended before."""
        with self._turn:
            if lane not in self._lanes:
                return False
            self._lanes.remove(lane)
            lane.session.close()
            return True


class _InProcessLane:
    def __init__(self, session: Session, receive: Receive, lost: Lost, link: InProcessLink) -> None:
        self.session = session
        self._receive, self._lost, self._link = receive, lost, link

    def send(self, entry: pb.SubmissionEntry) -> None:
        self._link.exchange(self.session, entry)

    def deliver(self, completions: list[pb.CompletionEntry]) -> None:
        for completion in completions:
            self._receive(completion)
        if self.session.ended:
            self.close()

    def close(self) -> None:
        if self._link.drop(self):
            self._lost("the drive closed the queue pair")
