"""The one file of the device that waits: completions are posted when they are due.

In time virtual and off everything is due at once, and `post` right after a command does all the
work. In wall time the event loop's timer calls again. The loop's selector is select(2), as its
timeout is in microseconds, where epoll's would round a 60 us page read up to a millisecond; the
loop itself watches two descriptors, gRPC's own are elsewhere.
"""

import asyncio
import selectors
from collections.abc import Awaitable, Callable

from csd_device.service.endpoint import Session
from csd_protocol.csd.v1 import csd_pb2 as pb
from csd_protocol.units import NS_PER_S

Write = Callable[[pb.CompletionEntry], Awaitable[None]]


def new_event_loop() -> asyncio.AbstractEventLoop:
    """An event loop whose timers are good to some 60 us."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


class Hold:
    """Posts one session's completions through `write`, each no earlier than it is due."""

    def __init__(self, session: Session, write: Write) -> None:
        self._session = session
        self._write = write
        self._writing = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._posting: asyncio.Task[None] | None = None

    async def post(self) -> None:
        """Posts what is due now and arms the timer for what is due next."""
        async with self._writing:
            for completion in self._session.take():
                await self._write(completion)
        self.arm()

    def arm(self) -> None:
        """Something may have become due: posts it in time, without waiting here."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wait_ns = self._session.wait_ns
        if wait_ns is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(wait_ns / NS_PER_S, self._wake)

    def close(self) -> None:
        """Nothing is posted any more."""
        for waiting in (self._timer, self._posting):
            if waiting is not None:
                waiting.cancel()

    def _wake(self) -> None:
        self._timer = None
        self._posting = asyncio.get_running_loop().create_task(self.post())
