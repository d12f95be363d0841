"""Garbage collection, wear, reclaim and bad blocks of the FTL."""

import tempfile
from collections.abc import Iterator
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csd_device.config import DriveConfig, load_config
from csd_device.errors import UnrecoveredRead, WriteFault, WriteProtected
from csd_device.ftl import Ftl, Stream, collector
from csd_device.ftl.folder import MediaFolder
from csd_device.ftl.victims import POLICIES, choose
from csd_device.nand import Pieces, RamMedia
from csd_device.nand.geometry import locate
from csd_device.nand.superblocks import Superblocks, SuperblockState
from csd_protocol.status import Status

SECTOR = 4096
DAY_NS = 86_400 * 10**9


def _config(blocks: int = 48, pages: int = 4, over: float = 0.25, **ftl: Any) -> DriveConfig:
    """Superblocks of four blocks on two channels; 64 sectors each with four pages a block."""
    tiny = load_config("tiny")
    shape = {
        "channels": 2,
        "dies_per_channel": 1,
        "planes_per_die": 2,
        "blocks_per_plane": blocks,
        "pages_per_block": pages,
    }
    return tiny.model_copy(
        update={
            "geometry": tiny.geometry.model_copy(update=shape),
            "ftl": tiny.ftl.model_copy(update={"over_provisioning": over, **ftl}),
            "queues": tiny.queues.model_copy(update={"mdts_bytes": 16 * SECTOR}),
        }
    )


CONFIG = _config()


class _NoCells:
    """Keeps nothing: for tests of where data goes."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def gather(self, pieces: Pieces, out: np.ndarray) -> None: ...

    def write(self, start: int, data: np.ndarray) -> None: ...

    def erase(self, start: int, length: int) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class _Failing(RamMedia):
    """Cells that fail where they are told to."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self.writes_left = self.erases_left = -1  # until one fails; below zero: none does
        self.lost: set[int] = set()  # PSAs

    def write(self, start: int, data: np.ndarray) -> None:
        self.writes_left -= 1
        if self.writes_left == -1:
            raise WriteFault("program failed", start)
        super().write(start, data)

    def erase(self, start: int, length: int) -> None:
        self.erases_left -= 1
        if self.erases_left == -1:
            raise WriteFault("erase failed", start)
        super().erase(start, length)

    def gather(self, pieces: Pieces, out: np.ndarray) -> None:
        lost = self.lost & set((pieces.starts // SECTOR).tolist())
        if lost:
            raise UnrecoveredRead("lost", np.array(sorted(lost)))
        super().gather(pieces, out)

    def close(self) -> None:
        """The cells stay for the next one who opens them."""


def _open(path: Path, media: Any, config: DriveConfig = CONFIG) -> Ftl:
    return Ftl(media, config, MediaFolder.open(path / "d", config))


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is some, so that a sync costs nothing."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="ftl-", dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def media() -> _Failing:
    return _Failing(CONFIG.geometry.raw_bytes)


@pytest.fixture
def ftl(tmp_path: Path, media: _Failing) -> Iterator[Ftl]:
    opened = _open(tmp_path, media)
    yield opened
    opened.close()


def _stamped(stamps: Any) -> np.ndarray:
    """Sectors full of their stamps."""
    return np.repeat(np.asarray(stamps, np.uint64), SECTOR // 8).view(np.uint8)


class _Host:
    """Writes and remembers."""

    def __init__(self, ftl: Ftl, seed: int = 0) -> None:
        self.ftl = ftl
        self.stamps = np.zeros(ftl.capacity_sectors, np.uint64)
        self.rng = np.random.default_rng(seed)
        self.written = 0

    def write(self, lpn: int, count: int, stream: Stream = Stream.HOST) -> Any:
        self.written += 1
        stamps = np.full(count, self.written, np.uint64)
        programs = self.ftl.write(lpn, _stamped(stamps), stream=stream)
        self.stamps[lpn : lpn + count] = stamps
        return programs

    def fill(self, stream: Stream = Stream.HOST) -> None:
        for lpn in range(0, self.ftl.capacity_sectors, 16):
            self.write(lpn, min(16, self.ftl.capacity_sectors - lpn), stream)

    def overwrite(self, times: int, end: int | None = None) -> None:
        for lpn in self.rng.integers(0, end or self.ftl.capacity_sectors, times).tolist():
            self.write(lpn, 1)

    def check(self) -> None:
        self.ftl.check()
        out = np.empty(self.stamps.size * SECTOR, np.uint8)
        self.ftl.read(0, out)
        assert (out == _stamped(self.stamps)).all()


# ---- write amplification -------------------------------------------------------------------------


def _greedy_closed_form(alpha: float) -> float:
    """A = alpha / (alpha + W(-alpha e^-alpha)), W Lambert's, alpha raw over logical sectors."""
    product, found = -alpha * exp(-alpha), -0.5
    for _ in range(100):
        found -= (found * exp(found) - product) / (exp(found) * (found + 1))
    return alpha / (alpha + found)


@pytest.mark.parametrize("over", [0.07, 0.15, 0.28])
def test_greedy_amplifies_as_the_closed_form_says(tmp_path: Path, over: float) -> None:
    """Over-provisioning of raw minus logical, over logical; uniform random single sectors."""
    config = _config(blocks=512, over=over / (1 + over), gc_policy="greedy", wear_spread=0)
    ftl = _open(tmp_path, _NoCells(config.geometry.raw_bytes), config)
    ftl.write(0, np.zeros(ftl.capacity_sectors * SECTOR, np.uint8))
    lpns = np.random.default_rng(1).integers(0, ftl.capacity_sectors, ftl.capacity_sectors)
    data, settled = bytes(SECTOR), 3 * lpns.size // 4
    for lpn in lpns[:settled].tolist():
        ftl.write(lpn, data)
    before = ftl.counters().pages_programmed
    for lpn in lpns[settled:].tolist():
        ftl.write(lpn, data)
    programmed = (ftl.counters().pages_programmed - before) * config.geometry.sectors_per_page
    alpha = config.geometry.raw_sectors / ftl.capacity_sectors
    measured = programmed / (lpns.size - settled)
    assert measured == pytest.approx(_greedy_closed_form(alpha), rel=0.10)
    ftl.check()
    ftl.close()


def test_no_write_waits_for_a_whole_superblock(ftl: Ftl, monkeypatch: pytest.MonkeyPatch) -> None:
    host = _Host(ftl)
    host.fill()
    host.overwrite(3000)
    monkeypatch.setattr(collector.Collector, "drain_one", lambda self: pytest.fail("waited"))
    moved = [ftl.counters().sectors_moved]
    for _ in range(1000):
        host.overwrite(1)
        moved.append(ftl.counters().sectors_moved)
    steps = np.diff(moved)
    assert 0 < steps.max() <= collector.BATCH_SECTORS + collector.PACE_MAX
    assert (steps > 0).mean() > 0.01
    host.check()


# ---- streams and victims -------------------------------------------------------------------------


def test_streams_share_no_superblock_and_weights_stay_where_they_are(ftl: Ftl) -> None:
    host, half = _Host(ftl), ftl.capacity_sectors // 2
    for lpn in range(half, ftl.capacity_sectors, 16):
        host.write(lpn, 16, Stream.WEIGHTS)
        host.write((lpn - half) // 2, 8)
    weights = ftl.table[half:].copy()
    host.overwrite(6000, end=half)
    host.check()
    assert ftl.counters().sectors_moved > 0
    assert (ftl.table[half:] == weights).all()
    lpns = ftl.reverse.reshape(-1, CONFIG.geometry.sectors_per_superblock).astype(np.int64) - 1
    is_cold = ftl.superblocks.streams == Stream.WEIGHTS
    assert (lpns[is_cold].max(axis=1) >= half).any()
    assert lpns[~is_cold].max() < half


@pytest.mark.parametrize("policy, expected", [("greedy", 1), ("cost-benefit", 0), ("weights", 2)])
def test_policies_choose(policy: str, expected: int) -> None:
    """Old and fuller, young and emptier, weights with a hole, full of valid data, not full."""
    blocks = Superblocks(5)
    blocks.valid[:] = 60, 50, 55, 100, 0
    blocks.opened_at[:] = 0, 900, 900, 0, 0
    blocks.streams[2] = Stream.WEIGHTS
    candidates = np.array([0, 1, 2, 3])
    assert choose(POLICIES[policy], blocks, candidates, 100, 1000) == expected
    assert choose(POLICIES[policy], blocks, candidates[3:], 100, 1000) is None


def test_among_equals_the_least_worn_is_taken() -> None:
    blocks = Superblocks(3)
    blocks.erases[:] = 5, 2, 3
    assert choose(POLICIES["greedy"], blocks, np.arange(3), 100, 0) == 1


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_keeps_the_data(tmp_path: Path, media: _Failing, policy: str) -> None:
    ftl = _open(tmp_path, media, _config(gc_policy=policy))
    host = _Host(ftl)
    host.fill()
    host.overwrite(2500)
    host.check()
    assert ftl.counters().write_amplification > 1
    ftl.close()


# ---- wear, reads, age ----------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 4])
def test_cold_data_moves_when_wear_spreads(tmp_path: Path, media: _Failing, limit: int) -> None:
    ftl = _open(tmp_path, media, _config(wear_spread=limit))
    host = _Host(ftl)
    host.fill(Stream.WEIGHTS)
    host.overwrite(16_000, end=ftl.capacity_sectors // 4)
    spread = ftl.counters().erases_spread
    assert spread <= 10 if limit else spread > 15
    host.check()
    ftl.close()


def _work_idle(ftl: Ftl) -> int:
    """Until there is nothing to do; how many sectors moved."""
    before = ftl.counters().sectors_moved
    while ftl.work_idle(64) is not None:
        pass
    return ftl.counters().sectors_moved - before


def test_idle_time_makes_room_ahead_and_no_more(ftl: Ftl) -> None:
    host = _Host(ftl)
    host.fill()
    host.overwrite(1500)
    free = ftl.counters().free_superblocks
    assert _work_idle(ftl) > 0
    assert ftl.counters().free_superblocks > free
    assert ftl.counters().gc_debt_sectors == 0
    assert _work_idle(ftl) == 0
    host.check()


def test_what_is_read_too_often_moves(tmp_path: Path, media: _Failing) -> None:
    ftl = _open(tmp_path, media, _config(reclaim_reads=10))
    host = _Host(ftl)
    for lpn in range(0, 256, 16):
        host.write(lpn, 16)
    where = ftl.table[:256].copy()
    for _ in range(3):
        ftl.read(64 * SECTOR, np.empty(64 * SECTOR, np.uint8))  # the 16 pages of superblock 1
    assert ftl.superblocks.reads[:4].tolist() == [0, 48, 0, 0]
    assert _work_idle(ftl) == 64
    moved = ftl.table[:256] != where
    assert moved.reshape(4, 64).all(axis=1).tolist() == [False, True, False, False]
    assert ftl.superblocks.states[1] == SuperblockState.FREE
    assert ftl.superblocks.reads[1] == 0
    host.check()
    ftl.close()


def test_what_is_old_moves_and_age_survives_restarts(tmp_path: Path, media: _Failing) -> None:
    config = _config(reclaim_days=10)
    ftl = _open(tmp_path, media, config)
    for day in (0, 4):
        ftl.pass_time(day * DAY_NS)
        ftl.write(day * 16, _stamped(range(64)))
    ftl.close()
    ftl = _open(tmp_path, media, config)
    assert ftl.superblocks.written_ns[:2].tolist() == [-4 * DAY_NS, 0]
    ftl.pass_time(7 * DAY_NS)
    assert _work_idle(ftl) == 64
    assert ftl.superblocks.states[:2].tolist() == [SuperblockState.FREE, SuperblockState.FULL]
    ftl.close()


def test_reads_and_wear_survive_a_crash(tmp_path: Path, media: _Failing) -> None:
    ftl = _open(tmp_path, media)
    host = _Host(ftl)
    host.fill()
    host.overwrite(1500)
    for _ in range(400):
        ftl.read(0, np.empty(256 * SECTOR, np.uint8))
    ftl.flush()
    ftl.flush()
    blocks = ftl.superblocks
    _cut_power(ftl)
    again = _open(tmp_path, media)
    assert (again.superblocks.erases == blocks.erases).all()
    assert abs(again.superblocks.reads - blocks.reads).max() < 1024 < blocks.reads.max()
    assert (again.superblocks.opened_at == blocks.opened_at).all()
    host.ftl = again
    host.check()
    again.close()


def _cut_power(ftl: Ftl) -> None:
    ftl._journal.close()
    ftl._folder.close()


# ---- bad blocks ----------------------------------------------------------------------------------


def test_a_failed_program_retires_its_superblock_and_the_write_succeeds(
    ftl: Ftl, media: _Failing
) -> None:
    host = _Host(ftl)
    host.write(0, 20)
    media.writes_left = 0
    host.write(10, 20)
    host.check()
    counters = ftl.counters()
    assert (counters.bad_superblocks, counters.is_read_only) == (1, False)
    assert counters.spare_superblocks == counters.spare_superblocks_initial - 1 > 0
    assert ftl.superblocks.retiring[0]
    assert _work_idle(ftl) == 10  # what was valid there
    assert ftl.superblocks.states[0] == SuperblockState.BAD
    host.check()


def test_a_failed_erase_is_a_bad_superblock(ftl: Ftl, media: _Failing) -> None:
    host = _Host(ftl)
    host.write(0, 64)
    host.write(0, 64)
    media.erases_left = 0
    ftl.flush()
    assert ftl.superblocks.states[0] == SuperblockState.BAD
    assert ftl.counters().bad_superblocks == 1
    host.check()


def _wear_out(host: _Host, media: _Failing) -> None:
    """Until the drive refuses."""
    for _ in range(1000):
        media.writes_left = 5
        host.overwrite(10)


def test_out_of_spares_is_read_only_for_good(tmp_path: Path, media: _Failing) -> None:
    ftl = _open(tmp_path, media)
    host = _Host(ftl)
    host.fill()
    spares = ftl.counters().spare_superblocks_initial
    with pytest.raises(WriteProtected, match=f"{spares + 1} .* bad and {spares}") as caught:
        _wear_out(host, media)
    assert caught.value.status is Status.WRITE_PROTECTED
    host.check()
    ftl.flush()
    for _ in range(2):
        counters = ftl.counters()
        assert counters.is_read_only
        assert (counters.bad_superblocks, counters.spare_superblocks) == (spares + 1, 0)
        with pytest.raises(WriteProtected):
            ftl.deallocate(0, 1)
        with pytest.raises(WriteProtected):
            ftl.write(0, bytes(SECTOR))
        assert ftl.work_idle(64) is None
        host.check()
        ftl.close()
        ftl = host.ftl = _open(tmp_path, media)
    ftl.close()


def test_cells_that_fail_while_data_moves_lose_nothing(tmp_path: Path, media: _Failing) -> None:
    config = _config(blocks=60, over=0.4)
    media = _Failing(config.geometry.raw_bytes)
    ftl = _open(tmp_path, media, config)
    host = _Host(ftl)
    host.fill()
    for wait in (100, 31, 57, 3, 200, 11):
        media.writes_left, media.erases_left = wait, wait // 3
        host.overwrite(800)
        host.check()
    counters = ftl.counters()
    assert counters.bad_superblocks > 6
    assert not counters.is_read_only
    ftl.close()


def test_what_cannot_be_read_stays_where_it_is(ftl: Ftl, media: _Failing) -> None:
    host = _Host(ftl)
    host.fill()
    lost = 7
    psa = int(ftl.table[lost]) - 1
    media.lost.add(psa)
    for lpn in np.random.default_rng(0).integers(8, ftl.capacity_sectors, 4000).tolist():
        host.write(lpn, 1)
    ftl.check()
    assert int(ftl.table[lost]) - 1 == psa
    with pytest.raises(UnrecoveredRead):
        ftl.read(lost * SECTOR, np.empty(SECTOR, np.uint8))
    assert ftl.superblocks.valid[psa // CONFIG.geometry.sectors_per_superblock] == 1
    host.write(lost, 1)
    ftl.flush()
    media.lost.clear()
    assert ftl.superblocks.states[psa // CONFIG.geometry.sectors_per_superblock] in (
        SuperblockState.FREE,
        SuperblockState.OPEN,
    )
    host.check()


# ---- the state -----------------------------------------------------------------------------------


def test_a_changed_sector_takes_eight_bytes_of_journal_at_most(ftl: Ftl) -> None:
    host = _Host(ftl)
    host.fill()
    for count, written in ((64, 1), (50, 8)):
        ftl.flush()
        size = ftl._journal.size_bytes
        moved = ftl.counters().sectors_moved
        for lpn in host.rng.permutation(ftl.capacity_sectors // 8)[:count].tolist():
            host.write(lpn * 8, written)
        ftl.flush()
        changed = count * written + ftl.counters().sectors_moved - moved
        superblocks = 12  # opened, freed
        assert ftl._journal.size_bytes - size <= 8 * changed + 4 * 72 + superblocks * 32 * 3


def test_a_layer_lies_on_all_channels() -> None:
    config = load_config("edge-gen5")
    unit_bytes, units = 3 * 4096, 2048  # a neuron of 2048 values in 16 bits; a layer of them
    first = 1_000_000
    sectors = np.arange(first, first + units * unit_bytes // SECTOR)  # packed side by side
    place = locate(config.geometry, np.unique(sectors // config.geometry.sectors_per_page))
    pages = np.bincount(place.channel, minlength=config.geometry.channels)
    assert pages.max() - pages.min() <= 1
    dies = np.unique(place.channel * config.geometry.dies_per_channel + place.die)
    assert dies.size == config.geometry.dies


@pytest.mark.parametrize("planted", ["table", "reverse", "valid", "free"])
def test_the_check_finds_what_is_planted(ftl: Ftl, planted: str) -> None:
    host = _Host(ftl)
    host.fill()
    ftl.check()
    blocks = ftl.superblocks
    parts = (ftl.table, ftl.reverse, blocks.valid, blocks.states)
    kept = [part.copy() for part in parts]
    if planted == "table":
        ftl.table[3] = ftl.table[4]
    elif planted == "reverse":
        ftl.reverse[5] = 0
    elif planted == "valid":
        blocks.valid[:2] += (1, -1)
    else:
        blocks.states[0] = SuperblockState.FREE
    with pytest.raises(AssertionError):
        ftl.check()
    for part, values in zip(
        (ftl.table, ftl.reverse, blocks.valid, blocks.states), kept, strict=True
    ):
        part[:] = values
    blocks.recount()
    ftl.check()
