"""Each checker catches a bug that is planted for it, and that no other checker sees."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from checker import Broken
from cut_files import CutFiles
from simulated_drive import SimulatedFtl
from simulation import Simulation
from world import CHECKERS, World, small_drive

from csd_device.errors import DriveRefused
from csd_device.ftl import Ftl, PagePrograms
from csd_device.nand.media import U8, Media, Pieces
from csd_device.nand.passing import PassingMedia

CONFIG = small_drive()
SUPERBLOCK_BYTES = CONFIG.geometry.superblock_bytes
NOTHING = np.empty(0, np.int64)
Plant = Callable[[pytest.MonkeyPatch], Callable[[Media], Media]]


def commands(world: World) -> None:
    """Enough of them to fill a few superblocks, a power loss, and a copy at the end."""
    for step in range(40):
        world.write(step * 5 % 90, 30)
        if step % 4 == 3:
            world.flush()
        if step % 16 == 15:
            world.lose_power()
        world.read_all()
    world.copy(200, 0, 8)
    world.read_all()


class ProgramsTwice(PassingMedia):
    """Tries a program again in the same place."""

    def write(self, start: int, data: U8) -> None:
        super().write(start, data)
        super().write(start, data)


class ProgramsBackwards(PassingMedia):
    """Writes the last pages of a command first."""

    def write(self, start: int, data: U8) -> None:
        page = CONFIG.geometry.page_bytes
        middle = (start + data.size // 2) // page * page - start
        if middle <= 0:
            super().write(start, data)
        else:
            super().write(start + middle, data[middle:])
            super().write(start, data[:middle])


class RefreshesInPlace(PassingMedia):
    """Erases a superblock that is in use, and writes what was there back."""

    def sync(self) -> None:
        super().sync()
        cells = np.empty(SUPERBLOCK_BYTES, np.uint8)
        for start in range(0, self.size_bytes, SUPERBLOCK_BYTES):
            whole = Pieces(np.array([start]), np.array([cells.size]), np.array([0]))
            self.gather(whole, cells)
            if cells[-1] or cells[-SUPERBLOCK_BYTES // 8]:
                self.erase(start, SUPERBLOCK_BYTES)
                self.write(start, cells)


def _plant_media(kind: type[PassingMedia]) -> Plant:
    return lambda patch: kind


def _plant_lost_flush(patch: pytest.MonkeyPatch) -> type[PassingMedia]:
    """Flush answers and does nothing."""
    patch.setattr(Ftl, "flush", lambda self: PagePrograms(NOTHING, NOTHING, NOTHING))
    return PassingMedia


def _plant_torn_write(patch: pytest.MonkeyPatch) -> type[PassingMedia]:
    """A write is two, the first of them durable; power goes before the second."""
    write, seen = Ftl.write, [0]

    def halves(self: Ftl, lpn: int, data: bytes, fua: bool = False) -> PagePrograms:
        middle = len(data) // 2 // 4096 * 4096
        seen[0] += 1
        if seen[0] % 11 == 0:
            write(self, lpn, data[:middle], fua=True)
            TornWorld.last.supply.go_off()
        return write(self, lpn, data, fua=fua)

    patch.setattr(Ftl, "write", halves)
    return PassingMedia


def _plant_wrong_counts(patch: pytest.MonkeyPatch) -> type[PassingMedia]:
    """A sector counts twice, in a superblock that is in nobody's way."""
    write = Ftl.write

    def counting(self: Ftl, *arguments: Any, **words: Any) -> PagePrograms:
        programs = write(self, *arguments, **words)
        self.superblocks.valid[-1] = 1
        return programs

    patch.setattr(Ftl, "write", counting)
    return PassingMedia


def _plant_forgotten_sector(patch: pytest.MonkeyPatch) -> type[PassingMedia]:
    """P2L keeps an entry that L2P does not have."""
    write = Ftl.write

    def keeping(self: Ftl, *arguments: Any, **words: Any) -> PagePrograms:
        programs = write(self, *arguments, **words)
        self.reverse[-1] = 1
        return programs

    patch.setattr(Ftl, "write", keeping)
    return PassingMedia


def _plant_shared_sectors(patch: pytest.MonkeyPatch) -> type[PassingMedia]:
    """A copy refers to the same cells, which are counted for both."""

    def refer(self: SimulatedFtl, target: int, source: int, count: int) -> None:
        table, valid = self.ftl.table, self.ftl.superblocks.valid
        table[target : target + count] = table[source : source + count]
        psas = table[target : target + count].astype(np.int64) - 1
        np.add.at(valid, psas // CONFIG.geometry.sectors_per_superblock, 1)

    patch.setattr(SimulatedFtl, "copy", refer)
    return PassingMedia


class NeverSynced(PassingMedia):
    """Media whose sync answers at once."""

    def sync(self) -> None: ...


def _sync_no(what: str) -> Callable[[CutFiles, int], None]:
    """An fsync that does nothing to a file, or to a folder."""
    sync = CutFiles.fsync

    def syncing(files: CutFiles, file: int) -> None:
        if files.is_folder(file) != (what == "folder"):
            sync(files, file)

    return syncing


FORGOTTEN_SYNCS: dict[str, tuple[type[PassingMedia], dict[str, Any]]] = {
    "of the media": (NeverSynced, {}),
    "of the journal": (PassingMedia, {"fdatasync": lambda files, file: None}),
    "of other files": (PassingMedia, {"fsync": _sync_no("file")}),
    "of the folder": (PassingMedia, {"fsync": _sync_no("folder")}),
}


class TornWorld(World):
    """The world that a planted bug finds its power supply in."""

    last: World

    def __init__(self, *arguments: Any, **words: Any) -> None:
        TornWorld.last = self
        super().__init__(*arguments, **words)


PLANTED: dict[str, tuple[str, Plant]] = {
    "a program tried again": ("programmed once", _plant_media(ProgramsTwice)),
    "pages from the last on": ("in order", _plant_media(ProgramsBackwards)),
    "an erase of what is in use": ("freed", _plant_media(RefreshesInPlace)),
    "a flush that is none": ("acknowledged", _plant_lost_flush),
    "a write in halves": ("acknowledged", _plant_torn_write),
    "a count off by one": ("valid counts", _plant_wrong_counts),
    "an entry left behind": ("inverse", _plant_forgotten_sector),
    "a copy by reference": ("inverse", _plant_shared_sectors),
}


def run(plant: Plant | None, without: str | None) -> None:
    checkers = [kind for kind in CHECKERS if kind.name != without]
    with pytest.MonkeyPatch.context() as patch:
        above = plant(patch) if plant else PassingMedia
        with TornWorld(np.random.default_rng(3), checkers=checkers, above=above) as world:
            commands(world)


def test_nothing_planted_nothing_found() -> None:
    run(None, None)


@pytest.mark.parametrize("bug", sorted(PLANTED))
def test_a_planted_bug_is_caught_by_its_checker(bug: str) -> None:
    name, plant = PLANTED[bug]
    with pytest.raises(Broken) as caught:
        run(plant, None)
    assert caught.value.checker == name


@pytest.mark.parametrize("bug", [bug for bug in PLANTED if PLANTED[bug][0] != "acknowledged"])
def test_and_by_no_other(bug: str) -> None:
    """The dictionary is always there: that it sees nothing is part of this."""
    name, plant = PLANTED[bug]
    run(plant, name)


@pytest.mark.parametrize("what", sorted(FORGOTTEN_SYNCS))
def test_a_forgotten_sync_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power losses lose data, or leave a folder that cannot be opened, within a few seeds."""
    above, methods = FORGOTTEN_SYNCS[what]
    for name, method in methods.items():
        monkeypatch.setattr(CutFiles, name, method)

    def some_runs() -> None:
        for seed in range(6):
            rng = np.random.default_rng(seed)
            with World(rng, above=above) as world:
                Simulation(world, rng).run(600)

    with pytest.raises((Broken, DriveRefused)):
        some_runs()
