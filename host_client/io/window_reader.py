"""Reads the drive's window, whose file may go away and come back as another one.

The drive empties and unlinks the file of a window that goes away, and makes a new one at the same
path. What lay in the old one, and every lease of it, is gone. So whoever reads says since which
*generation* of the file it holds its lease; a read of an older one raises WindowLost, and has to be
staged again first.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from host_client.io.errors import EndOfFile, ReadFailed, WindowLost, WindowMissing
from host_client.io.reader import Extent, Reader


class WindowReader:
    """A reader of whatever file is the window now. It belongs to one thread, `generation` to all.

    `reopen` opens it; it raises WindowMissing while there is none.
    """

    def __init__(self, reopen: Callable[[], Reader]) -> None:
        self._reopen = reopen
        self._reader = reopen()
        self._file = _identity(self._reader.path)
        self.generation = 0  # of the window's file, as far as this reader knows

    @property
    def name(self) -> str:
        """What kind of reader it is: io_uring or threads."""
        return self._reader.name

    def read(self, extents: Sequence[Extent], generation: int) -> None:
        """Returns when all bytes are in their buffers.

        `generation`: this reader's when the extents were staged, or before. Raises WindowLost, and
        what a reader raises.
        """
        self._follow()
        if generation != self.generation:
            raise WindowLost(self._reader.path)
        try:
            self._reader.read(extents)
        except (EndOfFile, ReadFailed) as error:
            self._follow()
            if generation != self.generation:
                raise WindowLost(self._reader.path) from error
            raise

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _follow(self) -> None:
        """Opens the window's file again where it is another one. Raises WindowLost: there is none.

        Noticed again at the next read, until there is one.
        """
        path = self._reader.path
        found = _identity(path)
        if found == self._file and found is not None:
            return
        try:
            again = self._reopen()
        except WindowMissing as error:
            raise WindowLost(path) from error
        self._reader.close()
        self._reader, self._file = again, _identity(path)
        self.generation += 1


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file this is; None: none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
