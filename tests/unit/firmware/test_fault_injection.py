"""Faults of a running drive: set by Set Features, seen in statuses, times and counters."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csd_device.clock import TimeMode, VirtualClock
from csd_device.config import DriveConfig, load_config
from csd_device.drive import Drive
from csd_device.errors import DriveRefused, UnrecoveredRead
from csd_device.fault_config import FaultsConfig
from csd_device.firmware import commands as c
from csd_device.service.endpoint import Endpoint
from csd_protocol.opcodes import Feature
from csd_protocol.packed import Role
from csd_protocol.status import Status
from host_client.driver import CommandFailed, DriveLost, DriveUnavailable
from host_client.driver import Drive as HostDrive
from host_client.driver.link import InProcessLink

TINY = load_config("tiny")
TR_NS = TINY.timing.read_ns
NO_CACHE = TINY.model_copy(
    update={"dram": TINY.dram.model_copy(update={"unit_cache_bytes": 0})}
)  # every unit comes from NAND


def inject(host, name: str | None, settings: dict[str, Any] | None, **more: Any) -> c.Completion:
    change = {"name": name, "settings": settings, **more}
    return host.run(c.SetFeatures(Feature.FAULT_INJECTION, 0, json.dumps(change).encode()))


def report(host) -> dict[str, Any]:
    return json.loads(host.ok(c.GetFeatures(Feature.FAULT_INJECTION)).result.data)


def all_of(site: int) -> c.Target:
    return c.Target(site, c.What.ALL)


@pytest.fixture
def pair(open_drive, make_host, packed):
    """A host of a drive in virtual time, without a unit cache, that holds the packed model."""
    host = make_host(open_drive(TimeMode.VIRTUAL, NO_CACHE))
    host.pack(packed)
    return rested(host)


@pytest.fixture
def filled(open_drive, make_host):
    """A host of a drive in virtual time whose first 64 pages are written, from page 0 on."""
    host = make_host(open_drive(TimeMode.VIRTUAL))
    host.write(0, bytes(range(256)) * 16 * 256)
    return rested(host)


def rested(host):
    """Once all programs are over, so that reads wait for nothing."""
    time = host.drive._controller.time
    assert time is not None
    host.drive.clock.advance_to(time.nand.idle_ns())
    return host


# ---- times -----------------------------------------------------------------------------------


def test_a_stage_is_slower_by_its_read_retries(pair, packed) -> None:
    """Of one site whose pages lie on dies of their own: by the most retries of any of them."""
    ffn = packed.find(Role.FFN, 0)
    pair.ok(c.Stage(1, (all_of(ffn),)))  # reads the manifest, too
    clean = pair.ok(c.Stage(1, (all_of(ffn),)))
    assert inject(pair, "bit_errors", {"rate": 1.2e-2}).status is Status.SUCCESS
    retries = _retries_of(pair.drive, packed, ffn)
    retried = pair.ok(c.Stage(1, (all_of(ffn),)))
    assert (pair.window(retried.result.sites[0]) == packed.units[ffn]).all()
    assert retries.max() > 0
    assert retries.size <= TINY.geometry.channels  # so no two share a die
    assert retried.timing.nand_ns - clean.timing.nand_ns == retries.max() * TR_NS
    assert report(pair)["counters"]["retried_sectors"] > 0
    inject(pair, None, None)
    assert pair.ok(c.Stage(1, (all_of(ffn),))).timing.nand_ns == clean.timing.nand_ns


def _retries_of(drive: Drive, packed, site: int) -> np.ndarray:
    """The most retries of any sector of each page of a site, straight from the media."""
    place = packed.manifest.sites[site]
    reads = drive._controller.ftl.read(place.offset_bytes, np.empty(place.length_bytes, np.uint8))
    assert reads.extra_ns is not None
    return reads.extra_ns // TR_NS


@pytest.mark.parametrize("moves_data", [False, True])
def test_a_batch_takes_the_retries_of_a_queue_pair(
    tmp_path: Path, make_host, moves_data: bool
) -> None:
    faults = FaultsConfig.model_validate({"bit_errors": {"rate": 1.2e-2}})
    config = TINY.model_copy(update={"faults": faults})
    one, other = (open_at(tmp_path / name, config) for name in ("one", "other"))
    data = np.random.default_rng(3).integers(0, 256, (512, 4096), np.uint8)
    hosts = [make_host(drive) for drive in (one, other)]
    for host in hosts:
        host.write(0, data.tobytes())
    start = one.clock.now_ns()
    slbas = np.random.default_rng(4).integers(0, 509, 40)
    out = np.empty((40, 3 * 4096), np.uint8) if moves_data else None
    done = one.read_batch(slbas, 3, np.full(40, start), out)
    for cid, slba in enumerate(slbas.tolist()):
        hosts[1].queue.submit(1000 + cid, c.Read(c.BlockRange(slba, 3)), start)
    answers = {item.cid - 1000: item.timing for item in hosts[1].queue.pop_due(1 << 62)}
    assert done.tolist() == [answers[cid].done_ns for cid in range(40)]
    assert one._controller.faults.counters.retries > 0
    if out is not None:
        rows = slbas[:, None] + np.arange(3)
        assert (out.reshape(40, 3, 4096) == data[rows]).all()
    one.close()
    other.close()


def test_a_slow_die_slows_its_reads_and_no_others(filled) -> None:
    before = _read_times(filled)
    done = inject(filled, "slow_dies", {"dies": [[0, 0], [3, 1]], "read_factor": 2.5})
    assert done.status is Status.SUCCESS
    slower = _read_times(filled) - before
    slow = [0, 8, 19, 27]  # planes of a die lie 8 pages apart, dies of a channel 16
    assert np.flatnonzero(slower).tolist() == slow
    assert (slower[slow] == int(1.5 * TR_NS)).all()
    now = filled.drive.clock.now_ns()
    slbas = np.arange(32) * 4
    spread = filled.drive.read_batch(slbas, 1, now + np.arange(32) * 10 * TR_NS) - now
    assert (np.diff(spread - np.arange(32) * 10 * TR_NS - slower) == 0).all()
    filled.drive.clock.advance_to(int(spread.max()) + now)
    inject(filled, "slow_dies", None)
    assert (_read_times(filled) == before).all()


def _read_times(host) -> np.ndarray:
    """What NAND takes of a read of each of the first 32 pages."""
    reads = (host.ok(c.Read(c.BlockRange(4 * page, 1))) for page in range(32))
    return np.array([done.timing.nand_ns for done in reads])


# ---- lost sectors ----------------------------------------------------------------------------


def test_lost_blocks_are_named_by_lba_until_written_again(filled) -> None:
    pair = filled
    assert inject(pair, "unreadable", {"lbas": [[7, 2], [40, 1]]}).status is Status.SUCCESS
    failed = pair.run(c.Read(c.BlockRange(0, 64)))
    assert failed.status is Status.UNRECOVERED_READ
    assert "LBAs 7, 8, 40 (physical sectors" in failed.detail
    assert failed.do_not_retry
    pair.ok(c.Read(c.BlockRange(9, 31)))
    pair.write(7 * 4096, bytes(8192))
    assert pair.ok(c.Read(c.BlockRange(7, 2))).result.data == bytes(8192)
    assert pair.run(c.Read(c.BlockRange(40, 1))).status is Status.UNRECOVERED_READ
    smart = json.loads(pair.ok(c.GetLogPage(2)).result.data)
    assert smart["faults"]["uncorrectable_sectors"] == 4
    assert smart["media_errors"] == 2


def test_lost_units_are_named_by_row(pair, packed) -> None:
    ffn = packed.manifest.sites[packed.find(Role.FFN, 0)]
    first = ffn.offset_bytes // 4096
    inject(pair, "unreadable", {"lbas": [[first + 1, 1]]})
    ftl = pair.drive._controller.ftl
    offsets = ffn.offset_bytes + np.arange(ffn.count) * ffn.unit_bytes
    with pytest.raises(UnrecoveredRead) as error:
        ftl.read_units(offsets, ffn.unit_bytes, np.empty((ffn.count, ffn.unit_bytes), np.uint8))
    ends = offsets + ffn.unit_bytes
    touching = (offsets < (first + 2) * 4096) & (ends > (first + 1) * 4096)
    assert error.value.rows is not None
    assert error.value.rows.tolist() == np.flatnonzero(touching).tolist()
    assert pair.run(c.Stage(1, (all_of(ffn.site),))).status is Status.UNRECOVERED_READ


# ---- wear to the end -------------------------------------------------------------------------


def test_failed_programs_grow_bad_superblocks_until_the_drive_is_read_only(
    tmp_path: Path, make_host
) -> None:
    """By the FTL: what was acknowledged stays readable, data is moved off, spares run out."""
    drive = open_at(tmp_path, short_lived(program_failures={"rate": 0.003}))
    host, rng = make_host(drive), np.random.default_rng(0)
    kept, pieces = {}, drive.capacity_bytes >> 20
    for _ in range(500):
        slba = int(rng.integers(0, pieces)) * 256
        data = rng.integers(0, 256, 1 << 20, np.uint8).tobytes()
        done = host.run(c.Write(slba, data))
        if done.status is not Status.SUCCESS:
            break
        kept[slba] = data
    spares = drive.config.spare_superblocks
    assert done.status is Status.WRITE_PROTECTED
    assert f"{spares + 1} superblocks went bad and {spares} were spare" in done.detail
    assert drive._controller.faults.counters.program_failures == spares + 1
    assert len(kept) > spares
    for slba, data in kept.items():
        assert host.ok(c.Read(c.BlockRange(slba, 256))).result.data == data
    drive.close()
    again = open_at(tmp_path, short_lived())
    host = make_host(again)
    assert host.run(c.Write(0, bytes(4096))).status is Status.WRITE_PROTECTED
    assert host.ok(c.Read(c.BlockRange(slba, 256))).result.data == kept[slba]
    again.close()


def test_a_failed_erase_makes_a_superblock_bad_and_loses_nothing(tmp_path: Path, make_host) -> None:
    drive = open_at(tmp_path, short_lived(erase_failures={"superblocks": [1, 3]}))
    host = make_host(drive)
    for fill in range(4):
        for slba in range(0, drive.capacity_bytes // 8192, 256):
            host.ok(c.Write(slba, bytes([fill]) * (1 << 20)))
    flash = json.loads(host.ok(c.GetLogPage(2)).result.data)["flash"]
    assert flash["superblocks_erased"] > 5
    assert flash["bad_superblocks"] == 2
    assert host.ok(c.Read(c.BlockRange(0, 256))).result.data == bytes([3]) * (1 << 20)
    drive.close()


def short_lived(**faults: Any) -> DriveConfig:
    """A drive of 40 superblocks, some to spare."""
    return with_faults(**faults).model_copy(
        update={
            "geometry": TINY.geometry.model_copy(update={"blocks_per_plane": 40}),
            "ftl": TINY.ftl.model_copy(update={"over_provisioning": 0.3}),
        }
    )


# ---- the window ------------------------------------------------------------------------------


def test_a_window_that_goes_away_takes_its_leases_with_it(pair, packed) -> None:
    ffn = packed.find(Role.FFN, 0)
    site = pair.ok(c.Stage(1, (all_of(ffn),))).result.sites[0]
    with pair.drive.window_path.open("rb") as held:
        assert inject(pair, "window_loss", {"staging_commands": 2}).status is Status.SUCCESS
        assert not pair.drive.window_path.exists()
        assert held.read() == b""
    assert pair.run(c.Release((site.lease,))).status is Status.NO_LEASE
    for _ in range(2):
        refused = pair.run(c.Stage(1, (all_of(ffn),)))
        assert refused.status is Status.WINDOW_UNAVAILABLE
        assert not refused.do_not_retry
    again = pair.ok(c.Stage(1, (all_of(ffn),))).result.sites[0]
    assert again.lease > site.lease
    assert (pair.window(again) == packed.units[ffn]).all()
    assert report(pair)["window_loss"] is None


def test_a_window_stays_away_until_the_fault_is_cleared(pair, packed) -> None:
    target = all_of(packed.find(Role.FFN, 0))
    inject(pair, "window_loss", {})
    assert pair.run(c.MemoryRangeSet(1 << 20, 0)).status is Status.WINDOW_UNAVAILABLE
    assert {pair.run(c.Stage(1, (target,))).status for _ in range(9)} == {Status.WINDOW_UNAVAILABLE}
    inject(pair, "window_loss", None)
    pair.ok(c.Stage(1, (target,)))


def test_a_drive_closes_while_its_window_is_gone(pair) -> None:
    inject(pair, "window_loss", {})
    pair.drive.close()


# ---- settings --------------------------------------------------------------------------------


def open_at(folder: Path, config: DriveConfig) -> Drive:
    folder.mkdir(exist_ok=True)
    return Drive.open(
        config,
        folder / "drive.csd",
        clock=VirtualClock(),
        time_mode=TimeMode.VIRTUAL,
        window_path=folder / "window",
    )


def with_faults(**faults: Any) -> DriveConfig:
    return TINY.model_copy(update={"faults": FaultsConfig.model_validate(faults)})


def test_settings_travel_there_and_back(drive) -> None:
    host = HostDrive(InProcessLink(Endpoint(drive)))
    off = host.faults()
    assert [name for name, value in off.items() if isinstance(value, dict)] == ["counters"]
    host.set_faults("bit_errors", {"rate": 0.25, "retry_levels": 3}, seed=9)
    host.set_faults("unreadable", {"psas": [[1, 2]]})
    now = host.faults()
    assert (now["seed"], now["bit_errors"]["rate"], now["bit_errors"]["retry_levels"]) == (
        9,
        0.25,
        3,
    )
    assert now["unreadable"] == {"psas": [[1, 2]], "lbas": [], "rate": 0.0}
    host.set_faults("bit_errors", None)
    assert host.faults()["bit_errors"] is None
    assert host.faults()["unreadable"] is not None
    host.clear_faults()
    assert host.faults() == off | {"seed": 9}


@pytest.mark.parametrize(
    "name, settings, said",
    [
        ("bit_errors", {"rate": -1}, r"bit_errors\.rate: "),
        ("bit_errors", {"what": 1}, r"bit_errors\.what: "),
        ("gremlins", {}, r"fault 'gremlins'; there are bit_errors, "),
        ("unreadable", {"psas": [[1 << 40, 1]]}, "psas end at "),
        ("unreadable", {"psas": [[0, 1 << 30]]}, "1073741824 sectors; 1048576 are the most"),
        ("slow_dies", {"dies": [[8, 0]], "read_factor": 2}, "die 0 of channel 8"),
    ],
)
def test_settings_that_cannot_be_name_their_field(drive, name, settings, said) -> None:
    host = HostDrive(InProcessLink(Endpoint(drive)))
    before = host.faults()
    with pytest.raises(CommandFailed, match=said) as error:
        host.set_faults(name, settings)
    assert error.value.status is Status.INVALID_FIELD
    assert host.faults() == before


def test_bytes_that_are_no_change_are_refused(host) -> None:
    for data in (b"{", b"[]", b'{"settings": {}}', b'{"name": "bit_errors", "more": 1}'):
        done = host.run(c.SetFeatures(Feature.FAULT_INJECTION, 0, data))
        assert done.status is Status.INVALID_FIELD, data


def test_a_drive_opens_with_the_faults_of_its_file(tmp_path: Path, make_host) -> None:
    drive = open_at(tmp_path, with_faults(bit_errors={"rate": 0.3}, seed=2))
    host = make_host(drive)
    assert report(host)["seed"] == 2
    host.write(0, bytes(4096))
    failed = host.run(c.Read(c.BlockRange(0, 1)))
    assert failed.status is Status.UNRECOVERED_READ
    assert "LBA 0 (physical sector 0: more than 288 wrong bits" in failed.detail
    drive.close()


def test_a_drive_whose_faults_are_nowhere_does_not_open(tmp_path: Path) -> None:
    with pytest.raises(DriveRefused, match=r"\[faults\] of tiny: .*LBA Out of Range"):
        open_at(tmp_path, with_faults(unreadable={"lbas": [[1 << 30, 1]]}))
    open_at(tmp_path, TINY).close()


# ---- power -----------------------------------------------------------------------------------


def test_a_drive_without_power_answers_nothing_until_it_is_opened_again(tmp_path: Path) -> None:
    drive = open_at(tmp_path, TINY)
    link = InProcessLink(Endpoint(drive))
    host = HostDrive(link)
    flushed, torn = bytes([1]) * 8192, bytes([2]) * 8192
    host.write(0, flushed)
    host.flush()
    host.set_faults("power_loss", {"after_operations": 1})
    host.write(8192, torn)
    with pytest.raises(DriveLost):
        host.flush()
    assert drive.is_off
    with pytest.raises(DriveLost):
        host.faults()
    with pytest.raises(DriveUnavailable):
        host.reconnect()
    drive.close()
    again = open_at(tmp_path, TINY)
    host = HostDrive(InProcessLink(Endpoint(again)))
    assert host.read(0, 8192) == flushed
    assert host.read(8192, 8192) in (torn, bytes(8192))
    assert host.faults()["power_loss"] is None
    host.write(8192, torn)
    host.flush()
    again.close()


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_drive_that_closes_without_power_opens_again(tmp_path: Path, after: int) -> None:
    drive = open_at(tmp_path, with_faults(power_loss={"after_operations": after}))
    with contextlib.suppress(DriveLost):
        HostDrive(InProcessLink(Endpoint(drive))).write(0, bytes([7]) * 4096)
    drive.close()
    again = open_at(tmp_path, TINY)
    found = HostDrive(InProcessLink(Endpoint(again))).read(0, 4096)
    assert found in (bytes(4096), bytes([7]) * 4096)
    again.close()
