"""Shared memory in huge pages: a file of small ones costs its readers twice the work.

Shared memory comes in small pages unless its mount says otherwise, but the kernel turns a range of
it into huge pages when asked to, by way of a mapping that is aligned like them.
"""

import ctypes
import mmap

HUGE_PAGE_BYTES = 2 << 20
_MAP_FIXED, _MADV_COLLAPSE = 0x10, 25  # linux/mman.h; the latter since Linux 6.1


def collapse(file: int, size_bytes: int) -> None:
    """Have the kernel put what the file holds into huge pages; where it cannot, all stays as is."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_ssize_t
    room_bytes = size_bytes + HUGE_PAGE_BYTES
    room = _map(libc, 0, room_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    if room == -1:
        return
    address = -(-room // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    flags = mmap.MAP_SHARED | _MAP_FIXED  # in the room that is ours: nothing else lies there
    if _map(libc, address, size_bytes, flags, file) == address:
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), _MADV_COLLAPSE)
    libc.munmap(ctypes.c_void_p(room), ctypes.c_size_t(room_bytes))


def _map(libc: ctypes.CDLL, address: int, size_bytes: int, flags: int, file: int) -> int:
    """What mmap returns: an address, or -1."""
    at, size, offset = ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), ctypes.c_int64(0)
    return int(libc.mmap(at, size, mmap.PROT_READ, flags, file, offset))
