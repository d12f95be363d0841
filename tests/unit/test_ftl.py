"""The FTL: gathers, accounting of pages, capacity, and what its folder refuses."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from csd_device.config import DriveConfig, load_config
from csd_device.errors import CapacityExceeded, DriveRefused, LbaOutOfRange, WriteFault
from csd_device.ftl import Ftl
from csd_device.ftl.folder import MediaFolder
from csd_device.nand import RamMedia
from csd_protocol.status import Status

SECTOR = 4096


def small_config(**geometry: int) -> DriveConfig:
    """32 superblocks of 16 pages of 4 sectors: 8 MiB of NAND, 7 MiB for the host."""
    tiny = load_config("tiny")
    values = {
        "channels": 2,
        "dies_per_channel": 1,
        "planes_per_die": 2,
        "blocks_per_plane": 32,
        "pages_per_block": 4,
        **geometry,
    }
    return tiny.model_copy(update={"geometry": tiny.geometry.model_copy(update=values)})


CONFIG = small_config()


@pytest.fixture
def ftl(tmp_path: Path) -> Iterator[Ftl]:
    opened = Ftl.open(tmp_path / "drive.csd", CONFIG)
    yield opened
    opened.close()


def _bytes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, count * SECTOR, dtype=np.uint8)


def _read(ftl: Ftl, lpn: int, count: int) -> np.ndarray:
    out = np.full(count * SECTOR, 0xEE, np.uint8)
    ftl.read(lpn * SECTOR, out)
    return out


def test_unmapped_reads_as_zeroes_and_touches_no_page(ftl: Ftl) -> None:
    out = np.full(10_000, 1, np.uint8)
    reads = ftl.read(123, out)
    assert not out.any()
    assert reads.ppns.size == reads.transfer_bytes.size == 0


def test_gives_back_what_was_written(ftl: Ftl) -> None:
    data = _bytes(100)
    ftl.write(17, data.tobytes())
    assert (_read(ftl, 17, 100) == data).all()
    assert not _read(ftl, 117, 3).any()
    assert ftl.used_sectors == 100
    assert ftl.is_mapped(16, 3).tolist() == [False, True, True]


def test_reads_name_each_page_once_and_move_whole_sectors(ftl: Ftl) -> None:
    ftl.write(0, _bytes(16))
    reads = ftl.read(SECTOR - 1, np.empty(2, np.uint8))
    assert (reads.ppns.tolist(), reads.transfer_bytes.tolist()) == ([0], [2 * SECTOR])
    reads = ftl.read(0, np.empty(16 * SECTOR, np.uint8))
    assert reads.ppns.tolist() == [0, 1, 2, 3]
    assert reads.transfer_bytes.tolist() == [4 * SECTOR] * 4


@pytest.mark.parametrize("unit_bytes", [1, 100, 3456, 4096, 12_289])
@pytest.mark.parametrize("order", ["ascending", "shuffled", "repeated"])
def test_gathers_units_like_slices(ftl: Ftl, unit_bytes: int, order: str) -> None:
    rng = np.random.default_rng(unit_bytes)
    for lpn in rng.permutation(40)[:30]:  # scattered, with holes
        ftl.write(int(lpn) * 5, _bytes(5, seed=int(lpn)))
    flat = _read(ftl, 0, 200)
    offsets = np.sort(rng.integers(0, 200 * SECTOR - unit_bytes, 50))
    if order == "shuffled":
        rng.shuffle(offsets)
    elif order == "repeated":
        offsets[:] = offsets[0]
    out = np.full((50, unit_bytes), 0xEE, np.uint8)
    reads = ftl.read_units(offsets, unit_bytes, out)
    assert (out == np.stack([flat[at : at + unit_bytes] for at in offsets])).all()
    _check_pages(ftl, reads.ppns, reads.transfer_bytes, offsets, unit_bytes)


def _check_pages(
    ftl: Ftl, ppns: np.ndarray, sizes: np.ndarray, offsets: np.ndarray, unit_bytes: int
) -> None:
    """Pages and bytes as the dumbest reading of the mapping gives them."""
    psas = set()
    for at in offsets.tolist():
        for lpn in range(at // SECTOR, (at + unit_bytes - 1) // SECTOR + 1):
            if ftl._table[lpn]:
                psas.add(int(ftl._table[lpn]) - 1)
    expected: dict[int, int] = {}
    for psa in sorted(psas):
        expected[psa // 4] = expected.get(psa // 4, 0) + SECTOR
    assert dict(zip(ppns.tolist(), sizes.tolist(), strict=True)) == expected


def test_programs_name_full_pages_and_a_flush_pads(ftl: Ftl) -> None:
    assert ftl.write(0, _bytes(6)).ppns.tolist() == [0]
    assert ftl.flush().ppns.tolist() == [1]
    assert ftl.flush().ppns.size == 0
    programs = ftl.write(9, _bytes(1), fua=True)
    assert (programs.ppns.tolist(), programs.transfer_bytes.tolist()) == ([2], [16384])
    counters = ftl.counters()
    assert (counters.sectors_written, counters.pages_programmed) == (7, 3)
    assert counters.write_amplification == pytest.approx(12 / 7)


@pytest.mark.parametrize("lpn, count", [(-1, 1), (0, 1 << 20), (1 << 30, 1)])
def test_beyond_the_end_is_refused(ftl: Ftl, lpn: int, count: int) -> None:
    calls = (
        lambda: ftl.write(lpn, bytes(count * SECTOR)),
        lambda: ftl.read(lpn * SECTOR, np.empty(count * SECTOR, np.uint8)),
        lambda: ftl.deallocate(lpn, count),
    )
    for call in calls:
        with pytest.raises(LbaOutOfRange, match=str(ftl.capacity_sectors)) as caught:
            call()
        assert caught.value.status is Status.LBA_OUT_OF_RANGE


def test_wholly_invalid_superblocks_are_erased_and_reused(ftl: Ftl) -> None:
    data = [_bytes(ftl.capacity_sectors, seed) for seed in range(4)]
    erased = 0
    for version in data:
        for lpn in range(0, ftl.capacity_sectors, 64):
            part = version[lpn * SECTOR : (lpn + 64) * SECTOR]
            erased += ftl.write(lpn, part).erased_ppns.size
    assert (_read(ftl, 0, ftl.capacity_sectors) == data[-1]).all()
    counters = ftl.counters()
    assert counters.superblocks_erased * CONFIG.geometry.planes == erased > 0
    assert counters.erases_max - counters.erases_mean <= 2


def test_a_full_drive_takes_overwrites_and_keeps_what_it_has(ftl: Ftl) -> None:
    data = _bytes(ftl.capacity_sectors)
    ftl.write(0, data)
    for lpn in range(0, ftl.capacity_sectors, 3):  # leaves no superblock wholly invalid
        sector = _bytes(1, lpn)
        ftl.write(lpn, sector)
        data[lpn * SECTOR : (lpn + 1) * SECTOR] = sector
    ftl.check()
    assert ftl.counters().sectors_moved > 0
    assert (_read(ftl, 0, ftl.capacity_sectors) == data).all()


def test_a_write_with_no_room_beside_what_it_replaces_is_refused(ftl: Ftl) -> None:
    data = _bytes(ftl.capacity_sectors)
    ftl.write(0, data)
    with pytest.raises(CapacityExceeded, match=r"7.0 MiB does not fit: .* of 8.0 MiB") as caught:
        ftl.write(0, _bytes(ftl.capacity_sectors, seed=1))
    assert caught.value.status is Status.CAPACITY_EXCEEDED
    assert (_read(ftl, 0, ftl.capacity_sectors) == data).all()
    ftl.deallocate_all()
    assert ftl.used_sectors == 0
    ftl.write(0, data)
    assert (_read(ftl, 0, ftl.capacity_sectors) == data).all()


def test_deallocated_and_zeroed_sectors_read_as_zeroes(ftl: Ftl) -> None:
    ftl.write(0, _bytes(30))
    ftl.deallocate(5, 5)
    ftl.write_zeroes(20, 1)
    kept = _read(ftl, 0, 30).reshape(30, SECTOR).any(axis=1)
    assert np.flatnonzero(~kept).tolist() == [5, 6, 7, 8, 9, 20]
    assert ftl.used_sectors == 24


def test_a_clean_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    ftl = Ftl.open(tmp_path / "d", CONFIG)
    ftl.write(3, _bytes(9))
    ftl.close()
    assert (tmp_path / "d/mapping.journal").stat().st_size == 0
    ftl = Ftl.open(tmp_path / "d", CONFIG)
    assert (_read(ftl, 3, 9) == _bytes(9)).all()
    assert ftl.write(100, _bytes(4)).ppns.tolist() == [3]
    ftl.close()


def test_an_untouched_mapping_takes_no_memory(tmp_path: Path) -> None:
    before = _anonymous_bytes()
    ftl = Ftl.open(tmp_path / "d", load_config("edge-gen5"))
    ftl.write(1_000_000, _bytes(16))
    assert not _read(ftl, 20_000_000, 1).any()
    ftl.flush()
    assert _anonymous_bytes() - before < 32 << 20 < ftl.mapping_bytes
    ftl.close()


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def test_a_second_daemon_is_refused_and_told_the_first(ftl: Ftl, tmp_path: Path) -> None:
    with pytest.raises(DriveRefused, match=f"in use by process {os.getpid()}"):
        Ftl.open(tmp_path / "drive.csd", CONFIG)


def test_another_geometry_is_refused_naming_both(tmp_path: Path) -> None:
    Ftl.open(tmp_path / "d", CONFIG).close()
    with pytest.raises(DriveRefused, match=r"geometry .*'channels': 2.*'channels': 4"):
        Ftl.open(tmp_path / "d", small_config(channels=4))
    Ftl.open(tmp_path / "d", CONFIG).close()


def test_another_format_version_is_refused_naming_both(tmp_path: Path) -> None:
    Ftl.open(tmp_path / "d", CONFIG).close()
    header = tmp_path / "d/header.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "version": 99}))
    with pytest.raises(DriveRefused, match=r"version 99; this drive has 2\. Remove .* pack"):
        Ftl.open(tmp_path / "d", CONFIG)


@pytest.mark.parametrize("header", ["{", "[]", '{"format": "other"}'])
def test_a_damaged_header_is_refused(tmp_path: Path, header: str) -> None:
    Ftl.open(tmp_path / "d", CONFIG).close()
    (tmp_path / "d/header.json").write_text(header)
    with pytest.raises(DriveRefused, match=r"header\.json"):
        Ftl.open(tmp_path / "d", CONFIG)


def test_what_is_no_media_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DriveRefused, match=r"no media folder: it has 'thesis.txt'"):
        Ftl.open(tmp_path, CONFIG)
    assert not (tmp_path / "nand.img").exists()
    with pytest.raises(DriveRefused, match="cannot be opened"):
        Ftl.open(tmp_path / "thesis.txt", CONFIG)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    ftl = Ftl.open(tmp_path / "d", CONFIG)
    ftl.write(0, _bytes(4))
    ftl.close()
    path = tmp_path / "d/mapping.checkpoint"
    data = bytearray(path.read_bytes())
    for damaged in (data[:10], data[:-1] + bytes([data[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(DriveRefused, match="damaged"):
            Ftl.open(tmp_path / "d", CONFIG)


class _FailingMedia(RamMedia):
    """Refuses writes from the `good`-th on."""

    good = 0

    def write(self, start: int, data: np.ndarray) -> None:
        if self.good == 0:
            raise WriteFault("cell array is gone")
        self.good -= 1
        super().write(start, data)


def test_a_write_fault_leaves_the_old_data(tmp_path: Path) -> None:
    media = _FailingMedia(CONFIG.geometry.raw_bytes)
    ftl = Ftl(media, CONFIG, MediaFolder.open(tmp_path / "d", CONFIG))
    media.good = 1
    ftl.write(0, _bytes(60))
    media.good = 1  # the second superblock's part of the next write fails
    with pytest.raises(WriteFault):
        ftl.write(0, _bytes(60, seed=1))
    assert (_read(ftl, 0, 60) == _bytes(60)).all()
    media.good = -1
    ftl.write(0, _bytes(60, seed=2))
    assert (_read(ftl, 0, 60) == _bytes(60, seed=2)).all()
    ftl.close()


def test_a_full_disk_at_the_start_of_a_superblock_costs_none_of_its_neighbours(
    tmp_path: Path,
) -> None:
    media = _FailingMedia(CONFIG.geometry.raw_bytes)
    ftl = Ftl(media, CONFIG, MediaFolder.open(tmp_path / "d", CONFIG))
    media.good = 1
    ftl.write(0, _bytes(64))  # all of a superblock; the next one's first write fails
    for _ in range(3):
        media.good = 0
        with pytest.raises(WriteFault, match="gone"):
            ftl.write(0, _bytes(5))
        media.good = -1
        ftl.flush()
        ftl.check()
    ftl.write(64, _bytes(64, seed=1))
    assert (_read(ftl, 0, 128) == np.concatenate([_bytes(64), _bytes(64, seed=1)])).all()
    assert ftl.counters().bad_superblocks == 0
    ftl.close()
