"""Reading the drive's window into host memory: buffers, extents, readers."""

from host_client.io.buffers import Buffer, BufferPool
from host_client.io.errors import (
    BuffersExhausted,
    EndOfFile,
    ReaderUnavailable,
    ReadFailed,
    WindowMissing,
)
from host_client.io.opening import open_reader
from host_client.io.reader import Extent, Reader, Ticket

__all__ = [
    "Buffer",
    "BufferPool",
    "BuffersExhausted",
    "EndOfFile",
    "Extent",
    "ReadFailed",
    "Reader",
    "ReaderUnavailable",
    "Ticket",
    "WindowMissing",
    "open_reader",
]
