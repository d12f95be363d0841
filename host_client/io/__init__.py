"""Reading the drive's window into host memory: buffers, extents, readers."""

from host_client.io.buffers import Buffer
from host_client.io.errors import (
    EndOfFile,
    ReaderError,
    ReaderUnavailable,
    ReadFailed,
    WindowMissing,
)
from host_client.io.opening import open_reader
from host_client.io.reader import Extent, Reader, Ticket

__all__ = [
    "Buffer",
    "EndOfFile",
    "Extent",
    "ReadFailed",
    "Reader",
    "ReaderError",
    "ReaderUnavailable",
    "Ticket",
    "WindowMissing",
    "open_reader",
]
