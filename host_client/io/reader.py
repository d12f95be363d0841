"""The contract of a reader: submit extents, wait for the ticket. Nothing else is the seam.

A reader belongs to the one thread that submits and waits (a second thread needs a reader of its
own); waiting releases the GIL, so that another thread computes meanwhile. Large extents are cut
into chunks, which complete in any order and any of which may come up short; a reader asks again
for what is missing. A ticket is done when all of its bytes have arrived or, after a failure, when
nothing of it is under way any more: then its buffers are the caller's again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from host_client.io.buffers import Buffer

CHUNK_BYTES = 1 << 20
DEPTH = 4  # chunks under way at once: more do not read faster and cost the computing thread


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes at `offset` of the file, to `buffer_offset` of a buffer. All in bytes."""

    offset: int
    length: int
    buffer: Buffer
    buffer_offset: int = 0


@dataclass(frozen=True, slots=True)
class Ticket:
    """What `submit` returns and `wait` takes, once."""

    number: int


class Reader(Protocol):
    """Reads ranges of one file into buffers."""

    name: str  # "io_uring" or "threads", as reports show it
    path: Path
    fallback_reason: str  # why this is not the faster kind; empty when it is

    def submit(self, extents: Sequence[Extent]) -> Ticket:
        """Start reading. Does not wait for data.

        Raises ValueError, before anything starts, for an extent that does not fit its buffer.
        """
        ...

    def wait(self, ticket: Ticket) -> None:
        """Return when all bytes of the ticket are in their buffers.

        Raises ReadFailed or EndOfFile naming file and offset, and ValueError for a ticket that
        was waited for before.
        """
        ...

    def read(self, extents: Sequence[Extent]) -> None:
        """`submit` and `wait` in one."""
        self.wait(self.submit(extents))

    def close(self) -> None:
        """Let what is under way finish, and close the file. May be called again."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_extents(extents: Sequence[Extent]) -> None:
    """Raises ValueError for negative numbers and for what reaches beyond its buffer."""
    for extent in extents:
        room = extent.buffer.size - extent.buffer_offset
        if extent.offset < 0 or extent.buffer_offset < 0 or not 0 <= extent.length <= room:
            raise ValueError(
                f"{extent.length} bytes at file offset {extent.offset} do not fit a buffer of "
                f"{extent.buffer.size} at {extent.buffer_offset}"
            )


def chunks_of(extents: Sequence[Extent], chunk_bytes: int) -> Iterator[Extent]:
    """The extents cut into pieces of at most `chunk_bytes`, empty ones left out."""
    for extent in extents:
        for start in range(0, extent.length, chunk_bytes):
            yield Extent(
                extent.offset + start,
                min(chunk_bytes, extent.length - start),
                extent.buffer,
                extent.buffer_offset + start,
            )
