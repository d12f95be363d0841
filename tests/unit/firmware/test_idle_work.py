"""What collecting costs in the flash's time, and what idle time is used for."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from csd_device.clock import TimeMode
from csd_device.config import DriveConfig, load_config
from csd_device.drive import Drive
from csd_device.firmware import commands as c
from csd_device.firmware.modelled_time import CommandTime
from csd_device.ftl import Stream
from csd_device.nand.superblocks import SuperblockState
from csd_protocol.packed import MODELS_OFFSET_BYTES

BLOCK = 4096
SECOND_NS = 10**9
Open = Callable[..., Drive]


def _config() -> DriveConfig:
    """48 superblocks of 64 sectors: 12 MiB."""
    tiny = load_config("tiny")
    shape = {"channels": 2, "dies_per_channel": 1, "planes_per_die": 2}
    shape |= {"blocks_per_plane": 48, "pages_per_block": 4}
    return tiny.model_copy(
        update={
            "geometry": tiny.geometry.model_copy(update=shape),
            "ftl": tiny.ftl.model_copy(update={"over_provisioning": 0.25}),
            "queues": tiny.queues.model_copy(update={"mdts_bytes": 16 * BLOCK}),
        }
    )


class _Fragmented:
    """A host whose drive has been filled and overwritten here and there."""

    def __init__(self, drive: Drive, make_host: Callable[..., Any]) -> None:
        self.drive = drive
        self.host = make_host(drive)
        self.ftl = drive._controller.ftl
        self.rng = np.random.default_rng(0)
        for slba in range(0, self.ftl.capacity_sectors, 16):
            self.host.ok(c.Write(slba, bytes(16 * BLOCK)))
        for _ in range(800):
            self.write()

    def write(self) -> c.Timing:
        slba = int(self.rng.integers(0, self.ftl.capacity_sectors))
        return self.host.ok(c.Write(slba, bytes(BLOCK))).timing


@pytest.fixture
def busy(open_drive: Open, make_host: Callable[..., Any]) -> _Fragmented:
    return _Fragmented(open_drive(TimeMode.VIRTUAL, _config()), make_host)


def test_moves_take_the_flash_time_of_their_reads_and_programs(busy: _Fragmented) -> None:
    timing, nand = busy.drive.config.timing, busy.drive._controller.time.nand
    before = busy.ftl.counters()
    worked_ns = nand.busy_times().die_ns.sum()
    for _ in range(100):
        busy.write()
    after = busy.ftl.counters()
    moved = after.pages_moved - before.pages_moved
    assert moved > 10
    programmed = after.pages_programmed - before.pages_programmed
    planes = busy.drive.config.geometry.planes_per_die  # one array operation may serve them all
    least_ns = (programmed * timing.program_ns + moved * timing.read_ns) // planes
    assert nand.busy_times().die_ns.sum() - worked_ns >= least_ns


def test_a_write_waits_for_its_own_programs_and_not_for_moves(busy: _Fragmented) -> None:
    programs = busy.ftl.flush()
    while programs.moved is None or not programs.moved.ppns.size:
        programs = busy.ftl.write(0, bytes(16 * BLOCK))
    start_ns = busy.drive._controller.time.nand.idle_ns() + SECOND_NS
    own = CommandTime(busy.drive._controller.time, start_ns)
    own.program_pages(programs)
    assert own.now_ns < busy.drive._controller.time.nand.idle_ns()


def test_idle_time_is_used_and_none_else(busy: _Fragmented) -> None:
    before = busy.ftl.counters()
    assert before.free_superblocks < 6
    busy.host.ok(c.KeepAlive())  # at once: no time to work in
    assert busy.ftl.counters().sectors_moved == before.sectors_moved
    busy.drive.clock.advance_to(busy.drive.clock.now_ns() + SECOND_NS)
    busy.host.ok(c.KeepAlive())
    after = busy.ftl.counters()
    assert after.sectors_moved > before.sectors_moved
    assert after.free_superblocks > before.free_superblocks
    assert after.gc_debt_sectors == 0
    assert busy.drive._controller.time.nand.idle_ns() < busy.drive.clock.now_ns()


def test_with_time_off_nothing_is_done_between_commands(
    open_drive: Open, make_host: Callable[..., Any]
) -> None:
    idle = _Fragmented(open_drive(TimeMode.OFF, _config()), make_host)
    moved = idle.ftl.counters().sectors_moved
    idle.drive.clock.advance_to(idle.drive.clock.now_ns() + SECOND_NS)
    idle.host.ok(c.KeepAlive())
    assert idle.ftl.counters().sectors_moved == moved


def test_packed_models_have_superblocks_of_their_own(
    open_drive: Open, make_host: Callable[..., Any], packed: Any
) -> None:
    """The directory comes first, as the packer writes it; then the model, and other data."""
    drive = open_drive()
    host = make_host(drive)
    writes = sorted(packed.writes)
    directory = [write for write in writes if write[0] < MODELS_OFFSET_BYTES]
    host.write(*directory[0])
    for offset_bytes, data in writes:
        if offset_bytes >= MODELS_OFFSET_BYTES:
            host.write(offset_bytes, data)
    ftl = drive._controller.ftl
    model = slice(MODELS_OFFSET_BYTES // BLOCK, ftl.capacity_sectors)
    psas = ftl.table[model].astype(np.int64)
    size = drive.config.geometry.sectors_per_superblock
    used = np.unique((psas[psas > 0] - 1) // size)
    assert (ftl.superblocks.streams[used] == Stream.WEIGHTS).all()
    others = np.flatnonzero(ftl.superblocks.states != SuperblockState.FREE)
    assert (ftl.superblocks.streams[others] == Stream.HOST).any()
