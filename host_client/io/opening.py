"""Choose a reader for a file: io_uring where it can be had, threads else, and say which."""

import importlib.util
import os
from pathlib import Path
from typing import Literal

from host_client.io.errors import ReaderUnavailable, WindowMissing
from host_client.io.reader import Reader
from host_client.io.thread_reader import ThreadReader

Kind = Literal["auto", "io_uring", "threads"]


def open_reader(path: str | os.PathLike[str], kind: Kind = "auto") -> Reader:
    """A reader of the file at `path`, which is opened read-only.

    `auto` takes io_uring and falls back to threads, whose `fallback_reason` then says why.
    Raises WindowMissing when the file cannot be opened, and ReaderUnavailable when io_uring was
    asked for by name and cannot be used.
    """
    location = Path(path)
    try:
        descriptor = os.open(location, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise WindowMissing(location, error.errno or 0) from error
    if kind == "threads":
        return ThreadReader(location, descriptor, fallback_reason="threads were asked for")
    try:
        return _uring_reader(location, descriptor)
    except ReaderUnavailable as error:
        if kind == "io_uring":
            os.close(descriptor)
            raise
        return ThreadReader(location, descriptor, fallback_reason=str(error))


def _uring_reader(path: Path, descriptor: int) -> Reader:
    if importlib.util.find_spec("liburing") is None:
        raise ReaderUnavailable("io_uring cannot be used here (package liburing is not installed)")
    from host_client.io.uring_reader import UringReader

    return UringReader(path, descriptor)
