"""A reader made of preadv in a few threads: works everywhere, and as the yardstick of the other."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from host_client.io.errors import EndOfFile, ReadFailed
from host_client.io.reader import CHUNK_BYTES, Extent, Reader, Ticket, check_extents, chunks_of


class ThreadReader(Reader):
    """Implements `Reader` with `threads` threads. Owns the descriptor that it is given."""

    name = "threads"

    def __init__(
        self,
        path: Path,
        descriptor: int,
        *,
        threads: int = 2,
        chunk_bytes: int = CHUNK_BYTES,
        fallback_reason: str = "",
    ) -> None:
        self.path = path
        self.fallback_reason = fallback_reason
        self._descriptor = descriptor
        self._chunk_bytes = chunk_bytes
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="csd-reader")
        self._tickets: dict[int, list[Future[None]]] = {}
        self._next_ticket = 0
        self._closed = False

    def submit(self, extents: Sequence[Extent]) -> Ticket:
        check_extents(extents)
        ticket = Ticket(self._next_ticket)
        self._next_ticket += 1
        self._tickets[ticket.number] = [
            self._threads.submit(self._read, chunk)
            for chunk in chunks_of(extents, self._chunk_bytes)
        ]
        return ticket

    def wait(self, ticket: Ticket) -> None:
        futures = self._tickets.pop(ticket.number, None)
        if futures is None:
            raise ValueError(f"ticket {ticket.number} is not under way")
        wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._threads.shutdown(wait=True)
        os.close(self._descriptor)

    def _read(self, chunk: Extent) -> None:
        memory = chunk.buffer.array[chunk.buffer_offset : chunk.buffer_offset + chunk.length].data
        done = 0
        while done < chunk.length:
            offset, left = chunk.offset + done, chunk.length - done
            try:
                count = os.preadv(self._descriptor, [memory[done:]], offset)
            except OSError as error:
                raise ReadFailed(self.path, offset, left, error.errno or 0) from error
            if count == 0:
                file_bytes = os.fstat(self._descriptor).st_size
                raise EndOfFile(self.path, offset, left, file_bytes)
            done += count
