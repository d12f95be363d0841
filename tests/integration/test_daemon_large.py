"""A drive of 2 TB on a machine that has neither the disk nor the memory for it: sparse media.

What lies on the media takes disk, and what is mapped takes memory, a small page of each table at a
time: an empty terabyte costs nothing but addresses. docs/TESTING.md states the bound.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from csd_protocol.units import MIB
from host_client.driver import Drive
from host_client.driver.embedded import Daemon

if "CSD_DRIVE" in os.environ:
    pytest.skip("the daemon is elsewhere: its memory cannot be read", allow_module_level=True)

MEMORY_BYTES_MAX = 256 * MIB
DISK_BYTES_MAX = 64 * MIB
CAPACITY_BYTES = 2_000_000_000_000
DEADLINE_S = 120.0
PIECES = 64
PIECE_BYTES = 64 << 10

# 2,100 superblocks of 1 GiB.
DRIVE = """
name = "large"
description = "2 TB drive"
geometry = { channels = 8, dies_per_channel = 8, planes_per_die = 4, blocks_per_plane = 2100, \
pages_per_block = 256, page_bytes = "16 KiB" }
timing = { cell = "tlc", read_ns = 40_000, program_ns = 400_000, erase_ns = 3_000_000, \
command_ns = 290, channel_mega_transfers_per_s = 1_600, channel_width_bits = 8 }
link = { generation = 5, lanes = 4, packet_payload_bytes = 256, packet_overhead_bytes = 28, \
firmware_ns = 1_000 }
dram = { total_bytes = "8 GiB", bandwidth_bytes_per_s = 10_000_000_000, \
window_bytes = "1 MiB", unit_cache_bytes = "1 MiB" }
compute = { ops_per_s = 100_000_000_000 }
ftl = { over_provisioning = 0.11 }
queues = { max_depth = 64, max_queues = 16, mdts_bytes = "1 MiB" }
"""


def memory_bytes(pid: int) -> int:
    """The most that the process has had resident so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def timed(what: str, act: Callable[[], object]) -> None:
    start = time.perf_counter()
    act()
    print(f"{what}: {time.perf_counter() - start:.2f} s")  # noqa: T201


class LargeDrive:
    """The daemon of one run of the drive, and a host that knows what it wrote."""

    def __init__(self, folder: Path) -> None:
        self.media = folder / "large.csd"
        self._preset = folder / "large.toml"
        self._preset.write_text(DRIVE)
        rng = np.random.default_rng(0)
        places = rng.integers(0, CAPACITY_BYTES // PIECE_BYTES, PIECES).tolist()
        self._written = {place * PIECE_BYTES: rng.bytes(PIECE_BYTES) for place in places}

    def start(self) -> None:
        self._daemon = Daemon.start(self.media, str(self._preset), "off", DEADLINE_S)
        self._host = Drive.connect(self._daemon.address)

    def write(self) -> None:
        last = self._host.capacity_bytes - PIECE_BYTES
        self._written |= {0: b"first".ljust(PIECE_BYTES), last: b"last".ljust(PIECE_BYTES)}
        for offset, data in self._written.items():
            self._host.write(offset, data)
        self._host.flush()

    def deallocate_half(self) -> None:
        half = self._host.capacity_bytes // 2 // PIECE_BYTES * PIECE_BYTES
        self._host.deallocate(half, self._host.capacity_bytes - half)
        for offset in self._written:
            if offset >= half:
                self._written[offset] = bytes(PIECE_BYTES)

    def check(self) -> None:
        assert self._host.capacity_bytes >= CAPACITY_BYTES
        for offset, data in self._written.items():
            assert self._host.read(offset, PIECE_BYTES) == data, offset

    def stop(self, number: signal.Signals) -> None:
        used = memory_bytes(self._daemon.pid)
        print(f"memory at most: {used / MIB:.0f} MiB")  # noqa: T201
        os.kill(self._daemon.pid, number)
        self._host.close()
        self._daemon.stop()
        assert used < MEMORY_BYTES_MAX


def test_two_terabytes_take_little_memory_and_disk(tmp_path: Path) -> None:
    drive = LargeDrive(tmp_path)
    timed("made and opened", drive.start)
    timed("written", drive.write)
    timed("read", drive.check)
    timed("closed", lambda: drive.stop(signal.SIGTERM))
    timed("opened", drive.start)
    timed("read", drive.check)
    timed("half of it deallocated", drive.deallocate_half)
    timed("written", drive.write)
    timed("killed", lambda: drive.stop(signal.SIGKILL))
    timed("recovered", drive.start)
    timed("read", drive.check)
    drive.stop(signal.SIGTERM)
    used = sum(path.stat().st_blocks * 512 for path in drive.media.rglob("*"))
    print(f"disk: {used / MIB:.0f} MiB")  # noqa: T201
    assert used < DISK_BYTES_MAX
