"""Where a physical page number (PPN) lies, as functions over arrays.

PPNs that follow each other lie on the next channel, then the next plane, then the next die, then
the next page of the block, then the next superblock:

    ppn = (((block * pages + page) * dies_per_channel + die) * planes + plane) * channels + channel

So consecutive writes spread over all channels first and let the planes of a die work together.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_device.config import Geometry

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Place:
    """Coordinates of pages, one array each; `die` counts within its channel."""

    channel: I64
    die: I64
    plane: I64
    block: I64
    page: I64


def locate(geometry: Geometry, ppns: I64) -> Place:
    """The coordinates of each page."""
    rest, channel = np.divmod(ppns, geometry.channels)
    rest, plane = np.divmod(rest, geometry.planes_per_die)
    rest, die = np.divmod(rest, geometry.dies_per_channel)
    block, page = np.divmod(rest, geometry.pages_per_block)
    return Place(channel, die, plane, block, page)


def ppns_at(geometry: Geometry, place: Place) -> I64:
    """The page at each place: the inverse of `locate`."""
    row = place.block * geometry.pages_per_block + place.page
    die = row * geometry.dies_per_channel + place.die
    plane = die * geometry.planes_per_die + place.plane
    return plane * geometry.channels + place.channel


def first_ppns_of(geometry: Geometry, superblock: int) -> I64:
    """The first page of each block of a superblock: what an erase names."""
    start = superblock * geometry.pages_per_superblock
    return np.arange(start, start + geometry.planes, dtype=np.int64)
