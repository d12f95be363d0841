"""`kill -9` of the daemon under mixed load: what was flushed is there, and nothing is torn.

Several hosts, each with a queue pair and a part of the namespace of its own, write, flush, trim and
read until the daemon is gone; the next daemon's answers are held against what each host knows. With
CSD_FULL set it is killed a hundred times, without it a few.
"""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from acknowledged import Acknowledged

from csd_protocol.status import Status
from host_client.driver import CommandFailed, Drive, DriveLost, DriveUnavailable
from host_client.driver.embedded import Daemon

if "CSD_DRIVE" in os.environ:
    pytest.skip("the daemon is elsewhere and not ours to kill", allow_module_level=True)

SEED = int(os.environ.get("CSD_SEED", "1"))
ROUNDS = 100 if "CSD_FULL" in os.environ else 6
HOSTS = 4
SECTORS = 1024  # of each host
SECTOR_BYTES = 4096
COUNT_MAX = 64  # sectors of a command
KILL_AFTER_MAX_S = 0.25
DEADLINE_S = 60.0

# 32 MiB of NAND in 64 superblocks: the hosts' 16 MiB are written over many times.
DRIVE = """
name = "killed"
description = "a small drive, often killed"
geometry = { channels = 2, dies_per_channel = 1, planes_per_die = 2, blocks_per_plane = 64, \
pages_per_block = 8, page_bytes = "16 KiB" }
timing = { read_ns = 20_000, program_ns = 100_000, erase_ns = 1_000_000, command_ns = 290, \
channel_mega_transfers_per_s = 1_000, channel_width_bits = 8 }
link = { bytes_per_s = 7_877_000_000, packet_payload_bytes = 256, packet_overhead_bytes = 28, \
firmware_ns = 1_000 }
dram = { total_bytes = "16 MiB", bandwidth_bytes_per_s = 10_000_000_000, \
window_bytes = "1 MiB", unit_cache_bytes = "1 MiB" }
compute = { ops_per_s = 100_000_000_000 }
ftl = { over_provisioning = 0.2 }
queues = { max_depth = 64, max_queues = 16, mdts_bytes = "1 MiB" }
"""


@dataclass
class Host:
    """One host's load and what it knows of its sectors."""

    number: int
    rng: np.random.Generator
    known: Acknowledged = field(default_factory=lambda: Acknowledged(SECTORS))
    stamp: int = 0
    acknowledged: int = 0
    flushed: int = 0
    refused: int = 0

    def load(self, address: str) -> None:
        """Until the daemon is gone."""
        with suppress(DriveLost, DriveUnavailable), Drive.connect(address) as drive:
            while True:
                self._step(drive)

    def verify(self, address: str) -> None:
        with Drive.connect(address) as drive:
            self.known.power_lost(self._read(drive, 0, SECTORS))

    def _step(self, drive: Drive) -> None:
        choice = self.rng.random()
        lpn = int(self.rng.integers(0, SECTORS))
        count = int(self.rng.integers(1, min(COUNT_MAX, SECTORS - lpn) + 1))
        if choice < 0.7:
            self._write(drive, lpn, count, fua=choice < 0.15)
        elif choice < 0.8:
            drive.flush()
            self.known.flushed()
            self.flushed += 1
        elif choice < 0.85:
            change = self.known.propose(lpn, np.zeros(count, np.uint64), is_whole=False)
            drive.deallocate(self._offset(lpn), count * SECTOR_BYTES)
            self.known.acknowledge(change)
        else:
            self.known.check_reads(lpn, self._read(drive, lpn, count))

    def _write(self, drive: Drive, lpn: int, count: int, fua: bool) -> None:
        self.stamp += 1
        values = np.arange(lpn, lpn + count, dtype=np.uint64) | np.uint64(self.stamp << 20)
        change = self.known.propose(lpn, values | np.uint64(self.number + 1 << 56))
        data = np.repeat(change.values, SECTOR_BYTES // 8).tobytes()
        try:
            drive.write(self._offset(lpn), data, fua)
        except CommandFailed as failed:
            if failed.status is not Status.CAPACITY_EXCEEDED:
                raise
            self.known.withdraw(change)
            self.refused += 1
        else:
            self.known.acknowledge(change, is_durable=fua)
            self.acknowledged += 1

    def _read(self, drive: Drive, lpn: int, count: int) -> np.ndarray:
        data = drive.read(self._offset(lpn), count * SECTOR_BYTES)
        words = np.frombuffer(data, np.uint64).reshape(count, -1)
        assert (words == words[:, :1]).all(), "a sector is a mixture"
        return words[:, 0].copy()

    def _offset(self, lpn: int) -> int:
        return (self.number * SECTORS + lpn) * SECTOR_BYTES


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, where a sync costs nothing: a kill leaves what was written, synced or not."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="csd-killed-", dir=memory) as made:
        yield Path(made)


def test_kill_9_under_load_loses_nothing_that_was_flushed(folder: Path) -> None:
    print(f"CSD_SEED={SEED}; threads and signals do not replay exactly")  # noqa: T201
    preset = folder / "killed.toml"
    preset.write_text(DRIVE)
    rng = np.random.default_rng(SEED)
    hosts = [Host(number, child) for number, child in enumerate(rng.spawn(HOSTS))]
    with ThreadPoolExecutor(HOSTS) as pool:
        for round_number in range(ROUNDS + 1):
            daemon = Daemon.start(folder / "d.csd", str(preset), "off", DEADLINE_S)
            try:
                list(pool.map(Host.verify, hosts, [daemon.address] * HOSTS))
                if round_number < ROUNDS:
                    kill_under_load(daemon, hosts, pool, float(rng.uniform(0, KILL_AFTER_MAX_S)))
            finally:
                daemon.stop()
    print(  # noqa: T201
        f"{ROUNDS} kills; {sum(host.acknowledged for host in hosts)} writes acknowledged, "
        f"{sum(host.flushed for host in hosts)} flushes, "
        f"{sum(host.refused for host in hosts)} writes refused for want of room"
    )
    assert all(host.acknowledged for host in hosts)


def kill_under_load(
    daemon: Daemon, hosts: list[Host], pool: ThreadPoolExecutor, after_s: float
) -> None:
    running = [pool.submit(host.load, daemon.address) for host in hosts]
    threading.Event().wait(after_s)
    os.kill(daemon.pid, signal.SIGKILL)
    for load in running:
        load.result(DEADLINE_S)
