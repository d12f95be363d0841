"""Sectors that are made: seen as they are written, kept over a restart, bounded."""

from pathlib import Path

import numpy as np
import pytest

from csd_device.checked_copy import Keep
from csd_device.config import load_config
from csd_device.errors import CommandError, DriveRefused
from csd_device.ftl import Ftl
from csd_device.nand import FileMedia, Pieces, RamMedia
from csd_device.nand.media import U8
from csd_device.nand.patterns import MAP_NAME, PATTERNS_MAX, PatternMedia, PatternTable
from csd_protocol.crc32c import crc32c_units
from csd_protocol.status import Status

SECTOR = 4096
SIZE = 1 << 20
RNG = np.random.default_rng(3)
PATTERNS = RNG.integers(0, 256, (5, SECTOR), np.uint8)
OTHERS = RNG.integers(0, 256, (5, SECTOR), np.uint8)


def _open(folder: Path) -> PatternMedia:
    return PatternMedia(FileMedia(folder / "nand.img", SIZE), folder)


def _read(media: PatternMedia, start: int, length: int) -> U8:
    out = np.empty(length, np.uint8)
    media.gather(Pieces(np.array([start]), np.array([length]), np.array([0])), out)
    return out


def _stored_bytes(folder: Path) -> int:
    return (folder / "nand.img").stat().st_blocks * 512


def test_a_pattern_that_is_written_takes_no_room_and_survives(tmp_path: Path) -> None:
    media = _open(tmp_path)
    numbers = media.table.define(PATTERNS)
    data = np.concatenate([PATTERNS[[3, 0, 3]], PATTERNS[[4]]]).reshape(-1)
    media.write(2 * SECTOR, data)
    media.sync()
    media.close()
    assert _stored_bytes(tmp_path) == 0
    again = _open(tmp_path)
    assert (_read(again, 2 * SECTOR + 100, 3 * SECTOR) == data[100 : 100 + 3 * SECTOR]).all()
    assert (again.table.define(PATTERNS) == numbers).all()
    assert again.table.count == len(PATTERNS)
    again.close()


def test_other_bytes_between_patterns_are_stored(tmp_path: Path) -> None:
    media = _open(tmp_path)
    media.table.define(PATTERNS)
    rows = np.stack([PATTERNS[1], OTHERS[0], OTHERS[1], PATTERNS[2], OTHERS[2], PATTERNS[2]])
    media.write(0, rows.reshape(-1))
    assert (_read(media, 0, rows.size) == rows.reshape(-1)).all()
    assert _stored_bytes(tmp_path) == 3 * SECTOR
    media.write(0, OTHERS[3])
    media.write(4 * SECTOR, PATTERNS[0])
    rows[0], rows[4] = OTHERS[3], PATTERNS[0]
    assert (_read(media, 0, rows.size) == rows.reshape(-1)).all()
    media.close()


def test_part_of_a_pattern_is_written_over(tmp_path: Path) -> None:
    media = _open(tmp_path)
    media.table.define(PATTERNS)
    expected = PATTERNS[[0, 1, 2]].reshape(-1).copy()
    media.write(0, expected)
    media.write(SECTOR - 10, OTHERS[0][:30])
    expected[SECTOR - 10 : SECTOR + 20] = OTHERS[0][:30]
    assert (_read(media, 0, expected.size) == expected).all()
    media.close()


@pytest.mark.parametrize("unit_bytes", [64, 1344, SECTOR, 6 * SECTOR])
@pytest.mark.parametrize("stored", [0.0, 0.3])
def test_units_are_copied_and_checked_in_any_order(
    tmp_path: Path, unit_bytes: int, stored: float
) -> None:
    media = PatternMedia(RamMedia(SIZE), tmp_path)
    media.table.define(PATTERNS)
    rng = np.random.default_rng(unit_bytes)
    rows = PATTERNS[rng.integers(0, 5, SIZE // SECTOR)]
    is_other = rng.random(len(rows)) < stored
    rows[is_other] = OTHERS[rng.integers(0, 5, int(is_other.sum()))]
    media.write(0, rows.reshape(-1))
    starts = rng.permutation(SIZE // unit_bytes)[:37].astype(np.int64) * unit_bytes
    expected = np.stack([rows.reshape(-1)[at : at + unit_bytes] for at in starts.tolist()])
    room = np.empty(expected.size + 128, np.uint8)
    first = -room.ctypes.data % 64
    out = room[first : first + expected.size].reshape(expected.shape)
    kept = np.zeros(9 * unit_bytes + 64, np.uint8)
    kept = kept[-kept.ctypes.data % 64 :]
    keep = Keep(kept, np.arange(8, dtype=np.int64)[::-1].copy() * unit_bytes)
    assert media.copy_units is not None
    into = rng.permutation(len(starts))
    checksums = media.copy_units(starts, out, into, keep)
    assert (out[into] == expected).all()
    assert (checksums == crc32c_units(expected)).all()
    assert (kept[: 8 * unit_bytes].reshape(8, -1) == expected[:8][::-1]).all()


def test_media_that_are_not_direct_stay_so(tmp_path: Path) -> None:
    class Indirect(RamMedia):
        copy_units = None  # type: ignore[assignment]

    assert PatternMedia(Indirect(SIZE), tmp_path).copy_units is None


def test_a_drive_has_so_many_patterns_and_no_more() -> None:
    table = PatternTable()
    sectors = np.zeros((PATTERNS_MAX, SECTOR), np.uint8)
    sectors[:, :2] = np.arange(PATTERNS_MAX, dtype="<u2").view(np.uint8).reshape(-1, 2)
    assert set(table.define(sectors).tolist()) == set(range(PATTERNS_MAX))
    with pytest.raises(CommandError, match="1 more patterns beside 4096") as raised:
        table.define(OTHERS[:1])
    assert raised.value.status is Status.CAPACITY_EXCEEDED
    assert (table.sectors(table.define(sectors[7:9])) == sectors[7:9]).all()


def test_patterns_too_much_alike_are_refused_and_forgotten() -> None:
    table = PatternTable()
    table.define(PATTERNS)
    twin = PATTERNS[:1].copy()
    twin[0, 9] ^= 1
    with pytest.raises(CommandError, match="differ too little"):
        table.define(twin)
    assert (table.find(PATTERNS.reshape(-1)) > 0).all()
    assert table.find(twin.reshape(-1)).tolist() == [0]


def test_a_map_without_its_patterns_is_refused(tmp_path: Path) -> None:
    media = _open(tmp_path)
    media.table.define(PATTERNS)
    media.write(0, PATTERNS[4])
    media.close()
    (tmp_path / "patterns.img").write_bytes(b"")
    with pytest.raises(DriveRefused, match=rf"{MAP_NAME} names pattern \d"):
        _open(tmp_path)


def test_a_torn_last_pattern_is_as_if_it_had_not_been(tmp_path: Path) -> None:
    media = _open(tmp_path)
    first = media.table.define(PATTERNS[:2])
    media.close()
    with (tmp_path / "patterns.img").open("ab") as file:
        file.write(OTHERS[0].tobytes()[:1000])
    again = _open(tmp_path)
    assert again.table.count == 2
    again.table.define(OTHERS[:1])
    again.close()
    last = _open(tmp_path)
    assert (last.table.define(np.concatenate([PATTERNS[:2], OTHERS[:1]]))[:2] == first).all()
    assert last.table.count == 3
    last.close()


def test_garbage_collection_moves_patterns_and_stores_nothing(tmp_path: Path) -> None:
    ftl = Ftl.open(tmp_path / "d", load_config("tiny"))
    ftl.patterns.define(PATTERNS)
    sectors = ftl.capacity_sectors
    rng = np.random.default_rng(0)
    content = rng.integers(0, 5, sectors)
    for lpn in range(0, sectors, 1024):
        part = PATTERNS[content[lpn : lpn + 1024]]
        ftl.write(lpn, part.reshape(-1))
    while ftl.counters().sectors_moved < 2000:
        lpn = int(rng.integers(0, sectors - 64))
        content[lpn : lpn + 64] = rng.integers(0, 5, 64)
        ftl.write(lpn, PATTERNS[content[lpn : lpn + 64]].reshape(-1))
    ftl.check()
    for lpn in range(0, sectors, 9973):
        out = np.empty(SECTOR, np.uint8)
        ftl.read(lpn * SECTOR, out)
        assert (out == PATTERNS[content[lpn]]).all()
    assert _stored_bytes(tmp_path / "d") == 0
    ftl.close()
