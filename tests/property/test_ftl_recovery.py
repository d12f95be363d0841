"""Torn and damaged journals, checkpoints; what power losses leave of wear.

Power loss at any instant is in tests/simulation.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from csd_device.config import DriveConfig, load_config
from csd_device.ftl import Ftl, journal, translation

SECTOR = 4096
SPACE = 96  # logical sectors the tests use
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # so that a sync costs nothing


def _config() -> DriveConfig:
    """24 superblocks of 8 pages of 4 sectors: 3 MiB of NAND, 2 MiB for the host."""
    tiny = load_config("tiny")
    geometry = tiny.geometry.model_copy(
        update={
            "channels": 2,
            "dies_per_channel": 1,
            "planes_per_die": 2,
            "blocks_per_plane": 24,
            "pages_per_block": 2,
        }
    )
    return tiny.model_copy(update={"geometry": geometry})


CONFIG = _config()


@pytest.fixture
def memory_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ftl-", dir=MEMORY) as folder:
        yield Path(folder)


def _sectors(stamp: int, count: int) -> bytes:
    """Sectors that name the write they came from, every eight bytes."""
    return np.full(count * SECTOR // 8, stamp, np.uint64).tobytes()


def _stamps(ftl: Ftl) -> tuple[int, ...]:
    """The stamp of each sector; asserts that no sector is a mix."""
    out = np.empty(SPACE * SECTOR, np.uint8)
    ftl.read(0, out)
    words = out.view(np.uint64).reshape(SPACE, -1)
    assert (words == words[:, :1]).all()
    return tuple(words[:, 0].tolist())


def _cut_power(ftl: Ftl) -> None:
    """What a kill leaves: files closed, nothing flushed, the lock gone."""
    ftl._journal.close()
    ftl._media.close()
    ftl._folder.close()


def test_a_journal_cut_at_any_byte_is_one_of_the_flushed_states(memory_path: Path) -> None:
    ftl = Ftl.open(memory_path / "d", CONFIG)
    states, ends = [_stamps(ftl)], [0]
    for stamp in range(1, 6):
        ftl.write(stamp * 7, _sectors(stamp, 12))
        ftl.deallocate(stamp, 2)
        ftl.flush()
        states.append(_stamps(ftl))
        ends.append(ftl._journal.size_bytes)
    _cut_power(ftl)
    path = memory_path / "d" / journal.JOURNAL_NAME
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        ftl = Ftl.open(memory_path / "d", CONFIG)
        flushed = sum(end <= cut for end in ends) - 1
        assert _stamps(ftl) == states[flushed], cut
        assert ftl._journal.size_bytes == ends[flushed]
        _cut_power(ftl)


def test_a_damaged_record_ends_the_journal_and_appending_goes_on(memory_path: Path) -> None:
    ftl = Ftl.open(memory_path / "d", CONFIG)
    for stamp in (1, 2):
        ftl.write(0, _sectors(stamp, 4), fua=True)
    _cut_power(ftl)
    path = memory_path / "d" / journal.JOURNAL_NAME
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x10
    path.write_bytes(data)
    ftl = Ftl.open(memory_path / "d", CONFIG)
    assert _stamps(ftl)[:4] == (1,) * 4
    ftl.write(8, _sectors(3, 1), fua=True)
    _cut_power(ftl)
    ftl = Ftl.open(memory_path / "d", CONFIG)
    assert _stamps(ftl)[:9] == (1,) * 4 + (0,) * 4 + (3,)
    ftl.close()


def test_records_that_the_checkpoint_contains_are_not_replayed(memory_path: Path) -> None:
    ftl = Ftl.open(memory_path / "d", CONFIG)
    ftl.write(0, _sectors(1, 8), fua=True)
    path = memory_path / "d" / journal.JOURNAL_NAME
    old = path.read_bytes()
    ftl.deallocate(0, 8)
    ftl.close()  # checkpoint; a crash here could have left the journal
    path.write_bytes(old)
    ftl = Ftl.open(memory_path / "d", CONFIG)
    assert not any(_stamps(ftl))
    ftl.write(0, _sectors(2, 1), fua=True)
    _cut_power(ftl)
    ftl = Ftl.open(memory_path / "d", CONFIG)
    assert _stamps(ftl)[:2] == (2, 0)
    ftl.close()


def test_a_long_journal_becomes_a_checkpoint(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(translation, "CHECKPOINT_BYTES", 2000)
    ftl = Ftl.open(memory_path / "d", CONFIG)
    for stamp in range(1, 200):
        ftl.write(stamp % SPACE, _sectors(stamp, 1), fua=True)
        assert ftl._journal.size_bytes <= 2000
    expected = _stamps(ftl)
    _cut_power(ftl)
    ftl = Ftl.open(memory_path / "d", CONFIG)
    assert _stamps(ftl) == expected
    ftl.close()


def test_power_losses_lose_no_superblock_and_no_wear(memory_path: Path) -> None:
    for stamp in range(1, 60):
        ftl = Ftl.open(memory_path / "d", CONFIG)
        ftl.write(0, _sectors(stamp, SPACE))
        ftl.flush()
        ftl.flush()
        before = ftl.counters()
        _cut_power(ftl)
    ftl = Ftl.open(memory_path / "d", CONFIG)
    ftl.flush()
    after = ftl.counters()
    assert (after.erases_max, after.erases_mean) == (before.erases_max, before.erases_mean)
    assert after.erases_mean > 1
    ftl.close()
