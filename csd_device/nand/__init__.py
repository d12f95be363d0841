"""NAND: geometry, media (where the bytes lie), block states, and when cell operations are done.

    Timeline(geometry, timing)          busy-until of each die and each channel, over arrays
        .read_pages(arrival_ns, ppns int64[n], transfer_bytes int64[n]) -> done_ns int64[n]
        .program_pages(arrival_ns, ppns, transfer_bytes) -> done_ns int64[n]
        .erase_blocks(arrival_ns, ppns) -> done_ns int64[n]     any page of each block
        .idle_ns() -> int               when all that was asked for so far is done
    Media                               protocol: write, gather, erase, sync, close
    FileMedia(path, size_bytes), DirectMedia(path, size_bytes, begin), RamMedia(size_bytes)

Times are the drive clock's; nothing here waits or reads it.
"""

from csd_device.nand.direct_media import DirectMedia
from csd_device.nand.media import FileMedia, Media, Pieces, RamMedia
from csd_device.nand.timeline import Timeline

__all__ = ["DirectMedia", "FileMedia", "Media", "Pieces", "RamMedia", "Timeline"]
