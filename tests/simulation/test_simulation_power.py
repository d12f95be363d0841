"""What is left when the power goes: of media, and of files."""

import os
from pathlib import Path

import numpy as np
import pytest
from cut_files import CutFiles, modules_with_files

from csd_device.nand import Pieces, RamMedia
from csd_device.nand.faults.power_loss import PowerCut, PowerLoss, PowerSupply
from csd_device.nand.media import U8

SECTOR = 4096
SECTORS = 64
SEEDS = range(20)


def supply_of(seed: int) -> PowerSupply:
    return PowerSupply(np.random.default_rng(seed))


def cells_of(media: RamMedia) -> U8:
    out = np.empty(media.size_bytes, np.uint8)
    media.gather(Pieces(np.array([0]), np.array([out.size]), np.array([0])), out)
    return out.reshape(-1, SECTOR)


def full(value: int, sectors: int = SECTORS) -> U8:
    return np.full(sectors * SECTOR, value, np.uint8)


def test_without_power_everything_raises() -> None:
    supply = supply_of(0)
    media = PowerLoss(RamMedia(SECTORS * SECTOR), supply)
    media.write(0, full(1))
    with pytest.raises(PowerCut):
        supply.go_off()
    nothing = np.empty(0, np.int64)
    for act in (
        lambda: media.write(0, full(2)),
        lambda: media.erase(0, SECTOR),
        media.sync,
        lambda: media.gather(Pieces(nothing, nothing, nothing), full(0)),
    ):
        with pytest.raises(PowerCut):
            act()
    media.close()


def test_what_was_synced_stays_and_the_rest_is_lost_by_sectors() -> None:
    kept = []
    for seed in SEEDS:
        cells, supply = RamMedia(SECTORS * SECTOR), supply_of(seed)
        media = PowerLoss(cells, supply)
        media.write(0, full(1))
        media.sync()
        media.write(0, full(2, SECTORS // 2))
        with pytest.raises(PowerCut):
            supply.go_off()
        found = cells_of(cells)
        assert (found == found[:, :1]).all(), seed
        assert (found[SECTORS // 2 :] == 1).all(), seed
        kept.append(int((found[: SECTORS // 2, 0] == 2).sum()))
    assert min(kept) == 0
    assert max(kept) == SECTORS // 2
    assert any(0 < count < SECTORS // 2 for count in kept)


def test_of_a_sector_the_newest_changes_are_lost_first() -> None:
    for seed in SEEDS:
        cells, supply = RamMedia(SECTORS * SECTOR), supply_of(seed)
        media = PowerLoss(cells, supply)
        for value in (1, 2):
            media.write(0, full(value))
        media.erase(0, SECTORS * SECTOR)
        media.write(0, full(3))
        with pytest.raises(PowerCut):
            supply.go_off()
        assert set(cells_of(cells)[:, 0].tolist()) <= {0, 1, 2, 3}, seed


def test_the_operation_that_is_cut_is_done_in_part() -> None:
    lengths = set()
    for seed in SEEDS:
        cells, supply = RamMedia(SECTORS * SECTOR), supply_of(seed)
        media = PowerLoss(cells, supply)
        media.sync()
        supply.go_off_at(0)
        with pytest.raises(PowerCut):
            media.write(0, full(5))
        lengths.add(int(np.count_nonzero(cells_of(cells))))
    assert len(lengths) > 2
    assert max(lengths) < SECTORS * SECTOR


def test_the_same_seed_loses_the_same() -> None:
    found = []
    for _ in range(2):
        cells, supply = RamMedia(SECTORS * SECTOR), supply_of(2)
        media = PowerLoss(cells, supply)
        for value in range(3):
            media.write(value * SECTOR, full(value + 1, 7))
        supply.go_off_at(0)
        with pytest.raises(PowerCut):
            media.write(0, full(9))
        found.append(cells_of(cells))
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_files_keep_what_was_synced_and_any_part_of_what_was_appended(
    tmp_path: Path, seed: int
) -> None:
    supply = supply_of(seed)
    files = CutFiles(supply)
    file = files.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    files.write(file, b"synced")
    files.fsync(file)
    files.write(file, b", not synced")
    with pytest.raises(PowerCut):
        supply.go_off()
    files.close_all()
    found = (tmp_path / "log").read_bytes()
    assert found.startswith(b"synced")
    assert b"synced, not synced".startswith(found)


def test_a_rename_lasts_when_its_folder_was_synced(tmp_path: Path) -> None:
    left: dict[bool, set[bytes]] = {True: set(), False: set()}
    for seed in SEEDS:
        for is_synced in left:
            left[is_synced].add(_rename(tmp_path, seed, is_synced))
    assert left == {True: {b"new"}, False: {b"old", b"new"}}


def _rename(folder: Path, seed: int, is_synced: bool) -> bytes:
    supply = supply_of(seed)
    files = CutFiles(supply)
    target = folder / "f"
    target.write_bytes(b"old")
    file = files.open(folder / "f.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    files.write(file, b"new")
    files.fsync(file)
    files.replace(folder / "f.new", target)
    if is_synced:
        files.fsync(files.open(folder, os.O_RDONLY))
    with pytest.raises(PowerCut):
        supply.go_off()
    files.close_all()
    return target.read_bytes()


def test_the_files_of_the_ftl_are_on_the_supply() -> None:
    names = {module.__name__.rpartition(".")[2] for module in modules_with_files()}
    assert {"folder", "journal"} <= names
