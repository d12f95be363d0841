"""What every `Media` does, clean or decorated."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csd_device.config import load_config
from csd_device.errors import DriveRefused, UnrecoveredRead, WriteFault
from csd_device.fault_config import FaultsConfig
from csd_device.nand import DirectMedia, FileMedia, Media, Pieces, RamMedia
from csd_device.nand.direct_media import Begin, at_once
from csd_device.nand.faults import NO_SECTORS, FaultCounters, Surroundings, faulty
from csd_device.nand.faults.power_loss import PowerLoss, PowerSupply
from csd_device.nand.media import U8
from csd_device.nand.passing import PassingMedia
from csd_device.nand.patterns import PatternMedia
from csd_device.nand.superblocks import Superblocks
from csd_device.service.read_threads import in_threads

SIZE = 1 << 20


def behind(faults: dict[str, Any]) -> Callable[[Path], Media]:
    """Media whose faults are on, at rates that lose nothing."""

    def make(_: Path) -> Media:
        config = load_config("tiny")
        superblocks = Superblocks(config.geometry.blocks_per_plane)
        around = Surroundings(config, superblocks, lambda: 0, FaultCounters())
        return faulty(RamMedia(SIZE), FaultsConfig.model_validate(faults), around, NO_SECTORS)

    return make


def with_patterns(folder: Path) -> Media:
    """Media that know some of what the tests write: zeroes, sevens, counting."""
    media = PatternMedia(FileMedia(folder / "nand.img", SIZE), folder)
    counting = np.arange(4096, dtype=np.uint32).astype(np.uint8)
    media.table.define(np.stack([counting, np.zeros_like(counting), np.full_like(counting, 7)]))
    return media


def direct(folder: Path, begin: Begin) -> Media:
    """Skips where the folder's filesystem has no direct I/O."""
    try:
        return DirectMedia(folder / "nand.img", SIZE, begin)
    except DriveRefused as error:
        pytest.skip(str(error))


MAKERS: dict[str, Callable[[Path], Media]] = {
    "ram": lambda folder: RamMedia(SIZE),
    "file": lambda folder: FileMedia(folder / "nand.img", SIZE),
    "patterns": with_patterns,
    "no patterns": lambda folder: PatternMedia(RamMedia(SIZE), folder),
    "on a power supply, patterns": lambda folder: PowerLoss(
        with_patterns(folder), PowerSupply(np.random.default_rng(0))
    ),
    "direct": lambda folder: direct(folder, at_once),
    "direct, other threads": lambda folder: direct(folder, in_threads()),
    "decorated": lambda folder: PassingMedia(RamMedia(SIZE)),
    "no bit errors": behind({"bit_errors": {"rate": 0.0}}),
    "bit errors": behind({"bit_errors": {"rate": 7e-3}}),
    "read retries": behind({"bit_errors": {"rate": 1.2e-2}}),
    "other sectors unreadable": behind({"unreadable": {"psas": [[256, 1]]}}),
    "other programs fail": behind({"program_failures": {"superblocks": [1]}}),
    "other erases fail": behind({"erase_failures": {"superblocks": [1]}}),
    "all faults": behind(
        {
            "bit_errors": {"rate": 1.2e-2},
            "unreadable": {"psas": [[256, 1]]},
            "program_failures": {"superblocks": [1]},
            "erase_failures": {"superblocks": [1]},
        }
    ),
    "on a power supply": lambda folder: PowerLoss(
        RamMedia(SIZE), PowerSupply(np.random.default_rng(0))
    ),
}


@pytest.fixture(params=sorted(MAKERS))
def media(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Media]:
    made = MAKERS[request.param](tmp_path)
    yield made
    made.close()


def _read(media: Media, start: int, length: int) -> U8:
    out = np.full(length, 0xEE, np.uint8)
    one = np.array
    media.gather(Pieces(one([start]), one([length]), one([0])), out)
    return out


def test_reads_zeroes_before_any_write(media: Media) -> None:
    assert media.size_bytes == SIZE
    assert not _read(media, 0, SIZE).any()


def test_gives_back_what_was_written(media: Media) -> None:
    data = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8)
    media.write(12_288, data)
    media.sync()
    assert (_read(media, 12_288, 100_000) == data).all()
    assert not _read(media, 0, 12_288).any()
    assert not _read(media, 112_288, 4096).any()


def test_gathers_pieces_in_any_order(media: Media) -> None:
    data = np.arange(8192, dtype=np.uint32).astype(np.uint8)
    media.write(0, data)
    starts, lengths, targets = np.array([5000, 1, 100]), np.array([700, 3, 50]), [60, 0, 5]
    out = np.zeros(800, np.uint8)
    media.gather(Pieces(starts, lengths, np.array(targets)), out)
    for start, length, target in zip(starts, lengths, targets, strict=True):
        assert (out[target : target + length] == data[start : start + length]).all()
    assert not out[3:5].any()
    assert not out[55:60].any()


def test_erased_cells_read_as_zeroes(media: Media) -> None:
    media.write(0, np.full(65536, 7, np.uint8))
    media.erase(8192, 16384)
    expected = np.full(65536, 7, np.uint8)
    expected[8192 : 8192 + 16384] = 0
    assert (_read(media, 0, 65536) == expected).all()


@pytest.mark.parametrize("start, length", [(-1, 1), (SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1)])
def test_outside_is_a_bug(media: Media, start: int, length: int) -> None:
    with pytest.raises(AssertionError):
        media.write(start, np.zeros(length, np.uint8))
    with pytest.raises(AssertionError):
        _read(media, start, length)


def test_a_file_keeps_its_cells_and_stays_sparse(tmp_path: Path) -> None:
    path = tmp_path / "nand.img"
    media = FileMedia(path, 64 * SIZE)
    media.write(SIZE, np.full(4096, 9, np.uint8))
    media.close()
    assert path.stat().st_blocks * 512 <= SIZE
    again = FileMedia(path, 64 * SIZE)
    assert (_read(again, SIZE, 4096) == 9).all()
    again.erase(0, 64 * SIZE)
    again.close()
    assert path.stat().st_blocks == 0
    assert path.stat().st_size == 64 * SIZE


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    FileMedia(tmp_path / "nand.img", SIZE).close()
    with pytest.raises(DriveRefused, match=r"is 1.0 MiB; the drive's NAND is 2.0 MiB"):
        FileMedia(tmp_path / "nand.img", 2 * SIZE)


def test_a_full_disk_is_a_write_fault(tmp_path: Path) -> None:
    media = FileMedia(tmp_path / "nand.img", SIZE)
    real, media._file = media._file, _full_device()
    try:
        with pytest.raises(WriteFault, match="No space left"):
            media.write(0, np.zeros(4096, np.uint8))
    finally:
        media._file = real
        media.close()


def _full_device() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def test_the_map_is_let_go_when_it_holds_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csd_device.nand.media.MAPPED_BYTES_MAX", 0)
    monkeypatch.setattr("csd_device.nand.media._CHECK_BYTES", 1)
    media = FileMedia(tmp_path / "nand.img", SIZE)
    media.write(0, np.full(SIZE, 3, np.uint8))
    for _ in range(3):
        assert (_read(media, 0, SIZE) == 3).all()
    media.close()


def test_direct_reads_that_end_early_name_their_sectors(tmp_path: Path) -> None:
    media = direct(tmp_path, in_threads())
    os.truncate(tmp_path / "nand.img", SIZE // 2)
    with pytest.raises(UnrecoveredRead, match=r"nand\.img cannot be read") as caught:
        _read(media, 0, SIZE)
    assert caught.value.psas is not None
    assert SIZE // 2 // 4096 in caught.value.psas
    assert not _read(media, 0, SIZE // 2).any()
    media.close()
