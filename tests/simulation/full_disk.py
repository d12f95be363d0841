"""The disk below the media folder is full for a while: every write to media or files fails.

Nothing is written then, so checkers of cells see nothing of it.
"""

import errno
import os

from csd_device.errors import WriteFault
from csd_device.nand.media import U8, Media
from csd_device.nand.passing import PassingMedia


class FullDisk:
    def __init__(self) -> None:
        self.is_full = False

    def around(self, media: Media) -> Media:
        return _FullMedia(media, self)

    def take(self) -> None:
        """Raises OSError when there is no room."""
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _FullMedia(PassingMedia):
    def __init__(self, inner: Media, disk: FullDisk) -> None:
        super().__init__(inner)
        self._disk = disk

    def write(self, start: int, data: U8) -> None:
        if self._disk.is_full:
            raise WriteFault("the disk is full")
        super().write(start, data)
