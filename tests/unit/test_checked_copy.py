"""Copies with a checksum in one pass, against numpy and the checksum of a buffer."""

from pathlib import Path

import numpy as np
import pytest

from csd_device.checked_copy import STREAM_BYTES_MIN, Keep, can_copy_checked, copy_checked
from csd_device.config import DriveConfig, MediaConfig, load_config
from csd_device.errors import DriveRefused
from csd_device.ftl import Ftl
from csd_device.ftl.translation import Wrap
from csd_device.nand import DirectMedia
from csd_device.nand.passing import PassingMedia
from csd_protocol.crc32c import crc32c


def lines(size: int, skipped: int = 0) -> np.ndarray:
    """Zeroes that start `skipped` bytes behind a multiple of 64."""
    memory = np.zeros(size + 128, np.uint8)
    first = -memory.ctypes.data % 64 + skipped
    return memory[first : first + size]


def copied(count: int, unit_bytes: int, kept: int) -> None:
    rng = np.random.default_rng(count)
    source = rng.integers(0, 256, (count + 1) * unit_bytes, np.uint8)
    starts = rng.permutation(count).astype(np.int64) * unit_bytes + 5  # no alignment of the source
    out, memory = lines((count + 2) * unit_bytes).reshape(count + 2, -1), lines(kept * unit_bytes)
    keep = Keep(memory, np.arange(kept, dtype=np.int64)[::-1] * unit_bytes)
    rows = rng.permutation(count + 2)[:count]
    checksums = copy_checked(source, starts, out, rows, keep)
    expected = [source[start : start + unit_bytes] for start in starts]
    assert (out[rows] == np.stack(expected)).all()
    assert not np.delete(out, rows, axis=0).any()
    assert checksums.tolist() == [crc32c(unit) for unit in expected]
    for index, start in enumerate(keep.starts):
        assert (memory[start : start + unit_bytes] == expected[index]).all()


@pytest.mark.parametrize("count, kept", [(1, 0), (4, 4), (9, 0), (9, 6), (11, 11)])
@pytest.mark.parametrize("unit_bytes", [64, 3456])
def test_copies_and_checksums(count: int, kept: int, unit_bytes: int) -> None:
    copied(count, unit_bytes, kept)


def test_a_large_copy_streams_to_the_same_end() -> None:
    unit_bytes = 1 << 20
    copied(STREAM_BYTES_MIN // unit_bytes + 1, unit_bytes, 3)


def test_what_has_no_whole_lines_is_not_for_it() -> None:
    none = Keep(lines(64), np.empty(0, np.int64))
    assert can_copy_checked(lines(128).reshape(2, 64), none)
    assert not can_copy_checked(lines(100).reshape(1, 100), none)
    assert not can_copy_checked(lines(128, skipped=8).reshape(2, 64), none)
    aside = Keep(lines(64, skipped=8), np.zeros(1, np.int64))
    assert not can_copy_checked(lines(128).reshape(2, 64), aside)


@pytest.mark.parametrize("start", [-1, 65])
def test_a_unit_outside_of_the_source_is_a_bug(start: int) -> None:
    none = Keep(lines(0), np.empty(0, np.int64))
    with pytest.raises(AssertionError):
        copy_checked(
            lines(128), np.array([start]), lines(64).reshape(1, 64), np.zeros(1, int), none
        )


@pytest.mark.parametrize("row", [-1, 1])
def test_a_row_outside_of_the_target_is_a_bug(row: int) -> None:
    none = Keep(lines(0), np.empty(0, np.int64))
    with pytest.raises(AssertionError):
        copy_checked(lines(64), np.zeros(1, int), lines(64).reshape(1, 64), np.array([row]), none)


def has_direct_io(folder: Path) -> bool:
    try:
        DirectMedia(folder / "probe.img", 4096).close()
    except DriveRefused:
        return False
    return True


@pytest.mark.parametrize("unit_bytes", [12_288, 3_456], ids=["whole pages", "parts of pages"])
@pytest.mark.parametrize("written", [7, 40], ids=["partly mapped", "all mapped"])
def test_the_ftl_reads_the_same_in_one_pass_and_in_two(
    tmp_path: Path, written: int, unit_bytes: int
) -> None:
    config = load_config("tiny")
    unbuffered = config.model_copy(update={"media": MediaConfig(direct_io=True)})
    kinds: list[tuple[str, DriveConfig, Wrap | None]] = [
        ("mapped", config, None),
        ("wrapped", config, lambda media, _: PassingMedia(media)),
    ]
    if has_direct_io(tmp_path):
        kinds.append(("direct I/O", unbuffered, None))
    data = np.random.default_rng(1).integers(0, 256, written * 4096, np.uint8)
    found = []
    for folder, kind, wrap in kinds:
        ftl = Ftl.open(tmp_path / folder, kind, wrap)
        ftl.write(0, data)
        out, memory = lines(13 * unit_bytes).reshape(13, -1), lines(2 * unit_bytes)
        keep = Keep(memory, np.array([unit_bytes, 0]))
        offsets = np.arange(13, dtype=np.int64) * unit_bytes
        reads, checksums = ftl.read_checked(offsets, out, np.arange(13)[::-1].copy(), keep)
        checksums = checksums[::-1]
        assert (memory.reshape(2, -1) == out[[11, 12]]).all()
        assert checksums.tolist() == [crc32c(unit) for unit in out]
        pages = (reads.ppns.tolist(), reads.transfer_bytes.tolist())
        assert ftl.superblocks.reads.sum() == reads.ppns.size
        found.append((out.tobytes(), *pages))
        ftl.close()
    assert all(one == found[0] for one in found)
    expected = np.zeros(13 * unit_bytes, np.uint8)
    filled = min(data.size, expected.size)
    expected[:filled] = data[:filled]
    assert found[0][0] == expected.reshape(13, -1)[::-1].tobytes()
