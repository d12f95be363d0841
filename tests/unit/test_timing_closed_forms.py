"""The equations of docs/TIMING.md, through firmware, FTL, flash and link, within 0.5 %."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csd_device.clock import TimeMode, VirtualClock
from csd_device.config import DriveConfig, load_config
from csd_device.drive import Drive
from csd_device.firmware import commands as c

KIB, MIB = 1 << 10, 1 << 20
OpenFilled = Callable[[DriveConfig], Drive]


def drive_of(**sections: dict[str, Any]) -> DriveConfig:
    """The reference drive with other figures; relations are checked again."""
    figures = load_config("reference").model_dump()
    for section, changed in sections.items():
        figures[section] |= changed
    return DriveConfig.model_validate(figures)


@pytest.fixture
def open_filled(tmp_path: Path) -> Iterator[OpenFilled]:
    """Opens a drive and writes its first 32 MiB; what is read later is on the flash."""
    drives = []

    def make(config: DriveConfig) -> Drive:
        folder = tmp_path / str(len(drives))
        drive = Drive.open(
            config,
            folder,
            clock=VirtualClock(),
            time_mode=TimeMode.VIRTUAL,
            window_path=tmp_path / f"window-{len(drives)}",
        )
        drives.append(drive)
        queue = drive.connect("host", "host")
        data = bytes(range(256)) * (MIB // 256)
        for cid in range(32):
            queue.submit(cid, c.Write(cid * 256, data), drive.clock.now_ns())
            (done,) = queue.pop_due(drive.clock.now_ns())
            assert not done.detail
        queue.close()
        drive.clock.advance_to(drive.clock.now_ns() + 10**9)
        return drive

    yield make
    for drive in drives:
        drive.close()


def loop(drive: Drive, size_bytes: int, depth: int, count: int, random: bool = True) -> np.ndarray:
    """Latencies and the rate a second of `count` reads of this size at this depth."""
    places = 32 * MIB // size_bytes
    order = np.random.default_rng(1).integers(0, places, count) if random else np.arange(count)
    slbas = order % places * (size_bytes // 4096)
    slots = np.full(depth, drive.clock.now_ns())
    return np.array(drive.read_closed_loop(slbas, size_bytes // 4096, slots))


def rate(times: np.ndarray, skip: int) -> float:
    """Completions a second once the first `skip` have filled the queues."""
    done = np.sort(times[1])
    return (done.size - skip) / (done[-1] - done[skip - 1]) * 1e9


@pytest.mark.parametrize(
    "size_bytes, flash_ns, link_ns",
    [
        (4 * KIB, 290 + 60_000 + 4096, 624),
        (16 * KIB, 290 + 60_000 + 16384, 624),
        (64 * KIB, 290 + 60_000 + 16384, 4 * 624),
    ],
)
def test_depth_1_reads(
    open_filled: OpenFilled, size_bytes: int, flash_ns: int, link_ns: int
) -> None:
    submitted, done = loop(open_filled(drive_of()), size_bytes, 1, 50)
    assert (done - submitted).mean() == pytest.approx(flash_ns + link_ns, rel=0.005)


def test_depth_1_where_the_link_is_slower_than_a_channel(open_filled: OpenFilled) -> None:
    slow = drive_of(link={"bytes_per_s": 100_000_000})
    submitted, done = loop(open_filled(slow), 16 * KIB, 1, 20)
    link_ns = slow.link.transfer_ns(16 * KIB)
    expected = 290 + 60_000 + 4096 + link_ns
    assert (done - submitted).mean() == pytest.approx(expected, rel=0.005)


def test_reference_point_depth_1(open_filled: OpenFilled) -> None:
    submitted, done = loop(open_filled(drive_of()), 4 * KIB, 1, 200)
    assert (done - submitted).mean() == pytest.approx(65_060, rel=0.01)
    assert rate(np.stack([submitted, done]), 1) == pytest.approx(15_371, rel=0.01)


def test_reference_point_saturated_random_reads(open_filled: OpenFilled) -> None:
    reads = rate(loop(open_filled(drive_of()), 16 * KIB, 256, 20_000), 1000)
    assert 247_653 <= reads < 8 * 1e9 / 16384


def test_die_bound_saturation(open_filled: OpenFilled) -> None:
    one_die = {"channels": 1, "dies_per_channel": 1, "planes_per_die": 1}
    drive = open_filled(drive_of(geometry=one_die))
    expected = 1e9 / (290 + 60_000 + 16384)
    assert rate(loop(drive, 16 * KIB, 32, 2000), 100) == pytest.approx(expected, rel=0.005)


def test_die_bound_saturation_with_cache_reads(open_filled: OpenFilled) -> None:
    one_die = {"channels": 1, "dies_per_channel": 1, "planes_per_die": 1}
    drive = open_filled(drive_of(geometry=one_die, timing={"cache_read": True}))
    expected = 1e9 / (290 + 60_000)
    assert rate(loop(drive, 16 * KIB, 32, 2000), 100) == pytest.approx(expected, rel=0.005)


def test_bus_bound_saturation(open_filled: OpenFilled) -> None:
    many_dies = {"channels": 1, "dies_per_channel": 16, "planes_per_die": 1}
    drive = open_filled(drive_of(geometry=many_dies))
    expected = 1e9 / (290 + 16384)
    assert rate(loop(drive, 16 * KIB, 256, 10_000), 1000) == pytest.approx(expected, rel=0.005)


def test_firmware_bound_saturation(open_filled: OpenFilled) -> None:
    slow = drive_of(link={"firmware_ns": 20_000, "firmware_cores": 2})
    reads = rate(loop(open_filled(slow), 4 * KIB, 64, 5000), 500)
    assert reads == pytest.approx(2e9 / 20_000, rel=0.005)


def test_large_sequential_reads_are_bound_by_the_link(open_filled: OpenFilled) -> None:
    config = drive_of()
    expected = 1e9 / config.link.transfer_ns(MIB)
    reads = rate(loop(open_filled(config), MIB, 8, 1000, random=False), 100)
    assert reads == pytest.approx(expected, rel=0.005)
    assert reads > 5_211  # the reference, whose link waits for whole pages


def test_large_sequential_reads_over_a_wide_link_are_bound_by_the_buses(
    open_filled: OpenFilled,
) -> None:
    drive = open_filled(drive_of(link={"bytes_per_s": 64_000_000_000}))
    expected = 1e9 / (8 * (290 + 16384))  # of its 64 pages each channel moves eight
    reads = rate(loop(drive, MIB, 8, 1000, random=False), 100)
    assert reads == pytest.approx(expected, rel=0.005)
