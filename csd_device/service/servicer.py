"""The gRPC servicer: one stream is one session.

Everything runs on the event loop's one thread, which is thereby the drive's firmware processor: a
command is handled and answered where it was read, with no other thread to wake and no lock.
Measured against handler threads with a queue to the response iterator, that is the faster shape
(one 8 KiB echo: 296 us against 387 us).
"""

from collections.abc import AsyncIterator

import grpc

from csd_device.service.endpoint import Endpoint, Session
from csd_device.service.hold import Hold
from csd_protocol.csd.v1 import csd_pb2 as pb
from csd_protocol.csd.v1.csd_pb2_grpc import ControllerServicer

Context = grpc.aio.ServicerContext[pb.SubmissionEntry, pb.CompletionEntry]


class QueuePairServicer(ControllerServicer):
    """Serves queue pairs of one drive."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._holds: dict[Session, Hold] = {}

    # gRPC lets a handler write through its context in place of yielding; the stub does not know.
    async def QueuePair(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[pb.SubmissionEntry], context: Context
    ) -> None:
        session = self._endpoint.open()
        hold = Hold(session, context.write)
        self._holds[session] = hold
        try:
            await self._serve(session, hold, request_iterator)
        finally:
            hold.close()
            del self._holds[session]
            session.close()

    async def _serve(
        self, session: Session, hold: Hold, entries: AsyncIterator[pb.SubmissionEntry]
    ) -> None:
        async for entry in entries:
            session.handle(entry)
            await hold.post()
            if session.ended:
                return
            self._arm_others(session)

    def _arm_others(self, acted: Session) -> None:
        """A command of one queue pair may complete another's Asynchronous Event Request."""
        if len(self._holds) == 1:
            return
        for session, hold in self._holds.items():
            if session is not acted and session.wait_ns == 0:
                hold.arm()
