"""What can go wrong with a read, named by file and place."""

import os
from pathlib import Path


class ReaderError(Exception):
    """What every error of a reader is."""


class ReadFailed(ReaderError):
    """A read that the kernel refused."""

    def __init__(self, path: Path, offset: int, length: int, errno: int) -> None:
        self.path, self.offset, self.length, self.errno = path, offset, length, errno
        super().__init__(
            f"{path}: reading {length} bytes at offset {offset} failed: {os.strerror(errno)}"
        )


class EndOfFile(ReaderError):
    """A read that reached beyond the file's last byte."""

    def __init__(self, path: Path, offset: int, length: int, file_bytes: int) -> None:
        self.path, self.offset, self.length, self.file_bytes = path, offset, length, file_bytes
        super().__init__(
            f"{path}: the file ends at {file_bytes} bytes; "
            f"{length} more were to be read at offset {offset}"
        )


class WindowMissing(ReaderError):
    """The drive's window cannot be opened from this host."""

    def __init__(self, path: Path, errno: int) -> None:
        self.path, self.errno = path, errno
        super().__init__(
            f"the drive's window {path} cannot be opened ({os.strerror(errno)}). The host must "
            "see the same file as the daemon: run both on one machine, or share its folder "
            "with the host's container"
        )


class WindowLost(ReaderError):
    """The window's file went away, and what was staged in it: stage again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(
            f"the drive's window {path} went away, and what was staged in it. "
            "It has to be staged again when the drive has a window again"
        )


class ReaderUnavailable(ReaderError):
    """The kind of reader that was asked for cannot work here; the message says why."""
