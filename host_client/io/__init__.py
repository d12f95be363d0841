"""Reading the drive's window into host memory: buffers, extents, readers."""

from host_client.io.buffers import Buffer
from host_client.io.errors import (
    EndOfFile,
    ReaderError,
    ReaderUnavailable,
    ReadFailed,
    WindowLost,
    WindowMissing,
)
from host_client.io.opening import open_reader
from host_client.io.reader import Extent, Reader, Ticket
from host_client.io.window_reader import WindowReader

__all__ = [
    "Buffer",
    "EndOfFile",
    "Extent",
    "ReadFailed",
    "Reader",
    "ReaderError",
    "ReaderUnavailable",
    "Ticket",
    "WindowLost",
    "WindowMissing",
    "WindowReader",
    "open_reader",
]
