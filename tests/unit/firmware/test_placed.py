"""A placed model: units lie in other slots, and nobody but the flash notices."""

from dataclasses import replace

import numpy as np
import pytest

from csd_device.clock import TimeMode
from csd_device.firmware import commands as c
from csd_protocol.packed import Role
from csd_protocol.status import Status
from csd_protocol.unit_table import UnitTable, decode_unit_table

BLOCK = 4096
NEURONS = 96


@pytest.fixture(params=[1, 2], ids=["once", "twice"])
def placed(request, pack_model):
    return pack_model(placed=True, copies=request.param)


def named(site: int, units: np.ndarray, copy: int = 0) -> c.Stage:
    target = c.Target(site, c.What.UNITS, units=units.astype(np.uint32))
    return c.Stage(1, (replace(target, copy=copy),))


def table_of(packed) -> UnitTable:
    data = next(data for at, data in packed.writes if at == packed.manifest.crc_table.offset_bytes)
    return decode_unit_table(packed.manifest, data[: packed.manifest.crc_table.length_bytes])


def test_units_are_asked_for_by_number(host, placed):
    host.pack(placed)
    rng = np.random.default_rng(3)
    for site, content in zip(placed.manifest.sites, placed.units, strict=True):
        for copy in range(placed.manifest.copies):
            size = rng.integers(1, site.count + 1)
            units = np.sort(rng.choice(site.count, size, replace=False))
            (staged,) = host.ok(named(site.site, units, copy)).result.sites
            np.testing.assert_array_equal(host.window(staged), content[units])
        (staged,) = host.ok(c.Stage(1, (c.Target(site.site, c.What.ALL),))).result.sites
        np.testing.assert_array_equal(host.window(staged), content)


def test_units_that_lie_together_cost_fewer_page_reads(open_drive, make_host, placed):
    host = make_host(open_drive(TimeMode.VIRTUAL))
    host.pack(placed)
    page_bytes = host.drive.config.geometry.sectors_per_page * BLOCK
    near, far = placed.manifest.ffns()
    count = page_bytes // near.unit_bytes // 2
    assert 2 < count < NEURONS / 2
    by_slot = np.sort(np.argsort(table_of(placed).slots[near.site])[:count])
    (staged,) = host.ok(named(near.site, by_slot)).result.sites
    assert staged.nand_page_reads <= 2
    pages = far.length_bytes // page_bytes
    (staged,) = host.ok(named(far.site, np.arange(count))).result.sites
    assert staged.nand_page_reads >= pages >= 2


def test_a_damaged_unit_is_called_by_its_number(host, placed):
    host.pack(placed)
    site = placed.manifest.find(Role.FFN, 0)
    slots = table_of(placed).slots[site.site]
    at = site.offset_bytes + int(slots[17]) * site.unit_bytes
    data = bytearray(host.ok(c.Read(c.BlockRange(at // BLOCK, 1))).result.data)
    data[at % BLOCK] ^= 1
    host.write(at - at % BLOCK, bytes(data))
    failed = host.run(named(site.site, np.arange(NEURONS)))
    assert failed.status is Status.GUARD_CHECK
    assert "unit 17 of layers.0.ffn" in failed.detail
    (staged,) = host.ok(named(site.site, np.delete(np.arange(NEURONS), 17))).result.sites
    assert staged.unit_count == NEURONS - 1


def test_slots_that_are_no_order_are_no_model(host, placed):
    host.pack(placed)
    site = placed.manifest.find(Role.FFN, 0)
    table = table_of(placed)
    table.slots[site.site] = np.where(np.arange(NEURONS) == 3, 1 << 31, table.slots[site.site])
    data = table.encode()
    for copy in range(placed.manifest.copies):
        at = placed.manifest.table_of(copy).offset_bytes
        host.write(at, data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0"))
    failed = host.run(named(site.site, np.arange(3)))
    assert failed.status is Status.NO_MODEL
    assert "layers.0.ffn has slots twice, or none" in failed.detail
