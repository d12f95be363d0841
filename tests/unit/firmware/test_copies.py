"""Units that the media have lost: all of them named, and read from another copy."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csd_device.clock import TimeMode
from csd_device.errors import UnrecoveredRead
from csd_device.firmware import commands as c
from csd_device.ftl import Ftl
from csd_device.nand.media import Media, Pieces, Retries
from csd_device.nand.passing import PassingMedia
from csd_protocol.packed import Role
from csd_protocol.status import Status

SECTOR = 4096
NEURONS = 96


class LossyMedia(PassingMedia):
    """Media that cannot give back some sectors."""

    def __init__(self, inner: Media) -> None:
        super().__init__(inner)
        self.lost: set[int] = set()  # PSAs
        self.named = True  # whether an error says which

    def gather(self, pieces: Pieces, out: np.ndarray) -> Retries | None:
        for start, length in zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True):
            touched = range(start // SECTOR, (start + length - 1) // SECTOR + 1)
            bad = sorted(self.lost.intersection(touched))
            if bad:
                psas = np.array(bad[:1]) if self.named else None
                raise UnrecoveredRead(f"sector {bad[0]} cannot be read", psas)
        return self.inner.gather(pieces, out)


@dataclass
class Lab:
    """A host whose drive holds a model twice, on media that can lose sectors."""

    host: Any
    packed: Any
    media: LossyMedia
    ftl: Ftl

    def lose(self, site: int, unit: int, copy: int = 0) -> set[int]:
        """Loses the sector in which a unit of a copy begins; the units that go with it."""
        record = self.packed.manifest.sites[site]
        place = self.packed.manifest.place_of(record, copy)
        lpn = (place + unit * record.unit_bytes) // SECTOR
        self.media.lost.add(int(self.ftl.table[lpn]) - 1)
        first = (lpn * SECTOR - place) // record.unit_bytes
        last = (lpn * SECTOR + SECTOR - 1 - place) // record.unit_bytes
        return set(range(max(0, first), min(last, record.count - 1) + 1))

    def change(self, site: int, unit: int, copy: int = 0) -> None:
        """Another byte in a unit of a copy, which only its CRC32C can tell."""
        record = self.packed.manifest.sites[site]
        at = self.packed.manifest.place_of(record, copy) + unit * record.unit_bytes
        data = bytearray(self.host.ok(c.Read(c.BlockRange(at // SECTOR, 1))).result.data)
        data[at % SECTOR] ^= 1
        self.host.ok(c.Write(at // SECTOR, bytes(data)))

    def leases(self) -> int:
        return json.loads(self.host.ok(c.Identify(0xC0)).result.data)["leases"]


@pytest.fixture
def lab(open_drive, make_host, packed_twice, monkeypatch) -> Lab:
    made: list[LossyMedia] = []
    opened: list[Ftl] = []
    genuine = Ftl.open

    def open_lossy(directory: Any, config: Any, wrap: Any, begin: Any) -> Ftl:
        def wrap_lossy(media: Media, superblocks: Any) -> Media:
            made.append(LossyMedia(media))
            return wrap(made[-1], superblocks)

        opened.append(genuine(directory, config, wrap_lossy, begin))
        return opened[-1]

    monkeypatch.setattr(Ftl, "open", open_lossy)
    host = make_host(open_drive(TimeMode.VIRTUAL))
    host.pack(packed_twice)
    return Lab(host, packed_twice, made[0], opened[0])


def everything(site: int, **settings: Any) -> c.Target:
    return c.Target(site, c.What.ALL, **settings)


def lost_of(completion: c.Completion) -> dict[tuple[int, int], set[int]]:
    assert isinstance(completion.result, c.MediaError)
    return {(part.site, part.copy): set(part.units.tolist()) for part in completion.result.lost}


@pytest.mark.parametrize("named", [False, True])
def test_a_command_names_all_that_it_cannot_read(lab, named: bool) -> None:
    first, kv, second = (
        lab.packed.find(role, layer) for role, layer in ((Role.FFN, 0), (Role.KV, 0), (Role.FFN, 1))
    )
    lab.media.named = named
    expected = {
        (first, 0): lab.lose(first, 3) | lab.lose(first, 60),
        (second, 0): lab.lose(second, NEURONS - 1),
    }
    command = c.Stage(1, (everything(kv), everything(first), everything(second)))
    failed = lab.host.run(command)
    assert (failed.status, failed.do_not_retry) == (Status.UNRECOVERED_READ, True)
    assert lost_of(failed) == expected
    named = ", ".join(str(unit) for unit in sorted(expected[first, 0])[:8])
    assert f"m: units {named}" in failed.detail
    assert f"of layers.0.ffn (site {first}, layer 0, copy 0 of 2)" in failed.detail
    assert f"of layers.1.ffn (site {second}, layer 1, copy 0 of 2)" in failed.detail
    assert "cannot be read" in failed.detail
    assert failed.timing.nand_ns > 0
    assert lab.leases() == 0


def test_a_damaged_and_an_unreadable_unit_come_in_one_answer(lab) -> None:
    ffn = lab.packed.find(Role.FFN, 0)
    unread = lab.lose(ffn, 80)
    lab.change(ffn, 7)
    failed = lab.host.run(c.Stage(1, (everything(ffn),)))
    assert failed.status is Status.UNRECOVERED_READ
    assert lost_of(failed) == {(ffn, 0): unread | {7}}
    only = c.Target(ffn, c.What.UNITS, units=np.array([6, 7], np.uint32))
    failed = lab.host.run(c.Stage(1, (only,)))
    assert failed.status is Status.GUARD_CHECK
    assert "unit 7 of layers.0.ffn" in failed.detail
    assert lost_of(failed) == {(ffn, 0): {7}}


def test_lost_units_come_from_the_other_copy_in_one_lease(lab) -> None:
    ffn, kv = lab.packed.find(Role.FFN, 1), lab.packed.find(Role.KV, 1)
    lost = sorted(lab.lose(ffn, 40))
    lab.lose(ffn, 2, copy=1)
    elsewhere = (c.Elsewhere(1, np.array(lost, np.uint32)),)
    command = c.Stage(1, (everything(ffn, elsewhere=elsewhere), everything(kv)))
    for read in (len(lost), 0):  # the second time they are in the unit cache
        staged, other = lab.host.ok(command).result.sites
        assert staged.all_missing
        np.testing.assert_array_equal(lab.host.window(staged), lab.packed.units[ffn])
        assert (staged.units_from_copies, other.units_from_copies) == (read, 0)
        lab.host.ok(c.Release((staged.lease, other.lease)))
    log = json.loads(lab.host.ok(c.GetLogPage(0xC0)).result.data)
    assert log["totals"]["units_from_copies"] == len(lost)
    assert log["entries"][1]["sites"][0]["units_from_copies"] == len(lost)


def test_a_whole_site_from_the_second_copy_serves_the_first_from_the_cache(lab) -> None:
    ffn = lab.packed.find(Role.FFN, 0)
    lab.lose(ffn, 0)
    (staged,) = lab.host.ok(c.Stage(1, (everything(ffn, copy=1),))).result.sites
    assert staged.units_from_copies == NEURONS
    (again,) = lab.host.ok(c.Stage(1, (everything(ffn),))).result.sites
    assert (again.units_from_dram, again.units_from_copies) == (NEURONS, 0)
    np.testing.assert_array_equal(lab.host.window(again), lab.packed.units[ffn])


def test_a_copy_that_there_is_not_is_refused(lab) -> None:
    ffn = lab.packed.find(Role.FFN, 0)
    beyond = (c.Elsewhere(2, np.array([1], np.uint32)),)
    unordered = (c.Elsewhere(1, np.array([5, 1], np.uint32)),)
    for target in (everything(ffn, copy=2), everything(ffn, elsewhere=beyond)):
        refused = lab.host.run(c.Stage(1, (target,)))
        assert refused.status is Status.NO_SITE
        assert "2 copies, none numbered 2" in refused.detail
    refused = lab.host.run(c.Stage(1, (everything(ffn, elsewhere=unordered),)))
    assert refused.status is Status.NO_SITE
    assert lab.leases() == 0


def test_the_crc_table_has_copies_too(lab) -> None:
    table = lab.packed.manifest.table_of(0).offset_bytes // SECTOR
    lab.media.lost.add(int(lab.ftl.table[table]) - 1)
    ffn = lab.packed.find(Role.FFN, 0)
    (staged,) = lab.host.ok(c.Stage(1, (everything(ffn),))).result.sites
    np.testing.assert_array_equal(lab.host.window(staged), lab.packed.units[ffn])
    other = lab.packed.manifest.table_of(1).offset_bytes // SECTOR
    lab.media.lost.add(int(lab.ftl.table[other]) - 1)
    lab.host.write(lab.packed.writes[-1][0], lab.packed.writes[-1][1])  # forgets the model
    assert lab.host.run(c.Stage(1, (everything(ffn),))).status is Status.UNRECOVERED_READ


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(0, NEURONS - 1), st.integers(0, 1)), max_size=6))
def test_what_one_copy_has_is_had(lab, places: list[tuple[int, int]]) -> None:
    """Asking again with what was lost so far ends with the bytes, or with what no copy has."""
    ffn = lab.packed.find(Role.FFN, 0)
    lab.media.lost.clear()
    lab.host.ok(c.MemoryRangeSet(1 << 20, 0))  # no unit cache
    gone: list[set[int]] = [set(), set()]
    for unit, copy in places:
        gone[copy] |= lab.lose(ffn, unit, copy)
    elsewhere: tuple[c.Elsewhere, ...] = ()
    answer = lab.host.run(c.Stage(1, (everything(ffn),)))
    if answer.status is not Status.SUCCESS:
        assert lost_of(answer) == {(ffn, 0): gone[0]}
        elsewhere = (c.Elsewhere(1, np.array(sorted(gone[0]), np.uint32)),)
        answer = lab.host.run(c.Stage(1, (everything(ffn, elsewhere=elsewhere),)))
    if gone[0] & gone[1]:
        assert lost_of(answer) == {(ffn, 1): gone[0] & gone[1]}
    else:
        (staged,) = answer.result.sites
        np.testing.assert_array_equal(lab.host.window(staged), lab.packed.units[ffn])
        lab.host.ok(c.Release((staged.lease,)))
