"""An io_uring through the liburing wheel, reading into any memory, waiting without the GIL.

Three properties of the wheel shape this file. Its `prep_read` fills a whole bytearray and takes
nothing else, so one buffer could not be read in pieces: the submission entries are written here,
straight into the ring's own memory, in the kernel's layout (`struct io_uring_sqe`,
linux/io_uring.h, 64 bytes, never changed since Linux 5.1). That liburing and this file agree on
the place of an entry is checked once for each ring, when it is opened. Its waiting calls hold the
GIL: completions ring an eventfd, and reading that releases it. And on tmpfs a read would be
served inside the submitting call, again under the GIL: IOSQE_ASYNC moves it to kernel workers.
"""

import errno
import mmap
import os
from dataclasses import dataclass

import liburing
import numpy as np

from host_client.io.errors import ReaderUnavailable

_SQE = np.dtype(
    [
        ("opcode", "u1"),
        ("flags", "u1"),
        ("priority", "u2"),
        ("fd", "i4"),
        ("offset", "u8"),
        ("address", "u8"),
        ("length", "u4"),
        ("rw_flags", "u4"),
        ("user_data", "u8"),
        ("buffer_index", "u2"),
        ("personality", "u2"),
        ("splice_fd", "i4"),
        ("reserved", "u8", (2,)),
    ]
)
_OP_READ = 22  # IORING_OP_READ
_PROBE_TAG = 0x43_53_44


@dataclass(frozen=True, slots=True)
class Arrival:
    """One completion: its tag, and the bytes read or the errno (the other is 0)."""

    tag: int
    count: int
    errno: int


class Ring:
    """`entries` (a power of two) submission entries. Raises ReaderUnavailable saying why not."""

    def __init__(self, entries: int) -> None:
        self._ring = liburing.Ring()
        self._cqe = liburing.Cqe()
        self._entries = entries
        self._prepared = 0
        self._slots = np.empty(0, _SQE)
        try:
            liburing.io_uring_queue_init(entries, self._ring)
        except OSError as error:
            raise ReaderUnavailable(_why_refused(error)) from error
        self._event = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            liburing.io_uring_register_eventfd(self._ring, self._event)
            self._slots = np.frombuffer(self._map_entries(), _SQE)
            self._check_layout()
        except OSError as error:
            self.close()
            raise ReaderUnavailable(_why_refused(error)) from error
        except ReaderUnavailable:
            self.close()
            raise

    def prepare_read(self, fd: int, offset: int, address: int, length: int, tag: int) -> None:
        """Fill the next entry; `submit` hands it over. At most `entries` between two submits.

        `length` bytes at `address` must stay valid until the completion with this tag arrives.
        """
        liburing.io_uring_get_sqe(self._ring)
        slot = self._prepared % self._entries
        self._prepared += 1
        self._slots[slot] = (
            *(_OP_READ, liburing.IOSQE_ASYNC, 0, fd, offset, address, length, 0, tag),
            *(0, 0, 0, 0),
        )

    def submit(self) -> None:
        liburing.io_uring_submit(self._ring)

    def wait(self) -> list[Arrival]:
        """At least one completion; releases the GIL until there is one."""
        arrivals = self._ready()
        while not arrivals:
            os.eventfd_read(self._event)
            arrivals = self._ready()
        return arrivals

    def close(self) -> None:
        """Nothing may be under way."""
        self._slots = np.empty(0, _SQE)  # the mapping holds a descriptor of the ring
        liburing.io_uring_queue_exit(self._ring)
        os.close(self._event)

    def _ready(self) -> list[Arrival]:
        return [self._take() for _ in range(liburing.io_uring_cq_ready(self._ring))]

    def _take(self) -> Arrival:
        liburing.io_uring_peek_cqe(self._ring, self._cqe)
        entry = self._cqe[0]
        tag = entry.user_data
        try:
            arrival = Arrival(tag, entry.res, 0)
        except OSError as error:
            arrival = Arrival(tag, 0, error.errno or errno.EIO)
        liburing.io_uring_cqe_seen(self._ring, entry)
        return arrival

    def _map_entries(self) -> mmap.mmap:
        return mmap.mmap(
            self._ring.ring_fd,
            self._entries * _SQE.itemsize,
            flags=mmap.MAP_SHARED | mmap.MAP_POPULATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=liburing.IORING_OFF_SQES,
        )

    def _check_layout(self) -> None:
        """Let liburing write one entry, find it where and as expected, and see it completed."""
        target = bytearray(8)
        entry = liburing.io_uring_get_sqe(self._ring)
        liburing.io_uring_prep_read(entry, self._event, target, 0)
        entry.user_data = _PROBE_TAG
        written = self._slots[0]
        found = [int(written[name]) for name in ("opcode", "fd", "length", "user_data")]
        if found != [_OP_READ, self._event, len(target), _PROBE_TAG]:
            raise ReaderUnavailable(f"io_uring's submission entries are not as expected: {found}")
        self._prepared = 1
        os.eventfd_write(self._event, 1)  # the probe reads this very counter
        self.submit()
        if self.wait()[0] != Arrival(_PROBE_TAG, len(target), 0):
            raise ReaderUnavailable("io_uring does not complete a read of eight bytes")


def _why_refused(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    hint = {
        errno.EPERM: "not permitted: a container's seccomp profile, or kernel.io_uring_disabled",
        errno.ENOSYS: "this kernel has none",
        errno.ENOMEM: "no memory for its rings: see ulimit -l",
    }.get(error.errno or 0, os.strerror(error.errno or 0))
    return f"io_uring cannot be used here ({name}: {hint})"
