"""What a target itself says that the host holds: left out of it, and of nothing else."""

import json
from typing import Any

import numpy as np
import pytest

from csd_device.firmware import commands as c
from csd_protocol.packed import Role
from csd_protocol.status import Status

HIDDEN, NEURONS, PROGRAM = 64, 96, 7


def bitmap(*units: int) -> bytes:
    flags = np.zeros(NEURONS, np.bool_)
    flags[list(units)] = True
    return np.packbits(flags, bitorder="little").tobytes()


def predict(*targets: c.Target) -> c.PredictAndStage:
    hidden = np.random.default_rng(0).standard_normal((1, HIDDEN)).astype(np.float32)
    return c.PredictAndStage(1, PROGRAM, 0, hidden, targets)


def keep(site: int, fraction: float, **settings: Any) -> c.Target:
    return c.Target(site, c.What.KEEP, keep=fraction, **settings)


def staged(host: Any, command: c.Command) -> c.StagedSite:
    (site,) = host.ok(command).result.sites
    return site


def test_it_is_predicted_and_not_staged(staged_host, packed):
    ffn = packed.find(Role.FFN, 1)
    before = staged(staged_host, predict(keep(ffn, 0.5)))
    held = before.predicted[::2].tolist()
    site = staged(staged_host, predict(keep(ffn, 0.5, held=bitmap(*held))))
    assert site.predicted.tolist() == before.predicted.tolist()
    assert site.units.tolist() == before.predicted[1::2].tolist()
    np.testing.assert_array_equal(staged_host.window(site), packed.units[ffn][site.units])


def test_it_is_forgotten_with_the_command(staged_host, packed):
    ffn = packed.find(Role.FFN, 0)
    first = staged(staged_host, predict(keep(ffn, 0.25, held=bitmap(*range(NEURONS)))))
    assert (first.unit_count, first.lease, first.length_bytes) == (0, 0, 0)
    assert first.predicted.size == NEURONS // 4
    assert staged(staged_host, predict(keep(ffn, 0.25))).unit_count == NEURONS // 4


def test_it_adds_to_the_residency(staged_host, packed):
    ffn = packed.find(Role.FFN, 0)
    predicted = staged(staged_host, predict(keep(ffn, 0.5))).predicted
    resident, recent = predicted[:10], predicted[5:20]
    said = c.SiteResidency(ffn, c.Held.BITMAP, bitmap(*resident))
    staged_host.ok(c.HostResidency(1, (said,)))
    site = staged(staged_host, predict(keep(ffn, 0.5, held=bitmap(*recent))))
    assert site.units.tolist() == predicted[20:].tolist()
    everything = c.Target(ffn, c.What.ALL, held=bitmap(*recent))
    site = staged(staged_host, c.Stage(1, (everything,)))
    assert site.all_missing
    assert site.unit_count == NEURONS - 20
    units = np.array([*predicted[:22]], np.uint32)
    named = c.Target(ffn, c.What.UNITS, units=units, ignore_residency=True, held=bitmap(*recent))
    site = staged(staged_host, c.Stage(1, (named,)))
    assert site.units.tolist() == [*predicted[:5], *predicted[20:22]]


def test_it_is_not_brought_to_dram(staged_host, packed):
    ffn = packed.find(Role.FFN, 1)
    held = staged(staged_host, predict(keep(ffn, 0.1))).predicted
    site = staged(staged_host, predict(keep(ffn, 0.25, to_dram=True, held=bitmap(*held))))
    assert not np.isin(held, site.units).any()
    assert site.unit_count == NEURONS // 4 - held.size


@pytest.mark.parametrize("length", [1, NEURONS // 8 - 1, NEURONS // 8 + 1, 1000])
def test_a_bitmap_of_another_length_fails_the_command_and_leases_nothing(
    staged_host, packed, length
):
    kv, ffn = packed.find(Role.KV, 0), packed.find(Role.FFN, 0)
    targets = (c.Target(kv, c.What.ALL), keep(ffn, 0.5, held=bytes(length)))
    failed = staged_host.run(predict(*targets))
    assert failed.status is Status.INVALID_FIELD
    assert f"bitmap of {length} bytes for layers.0.ffn; its 96 units take 12" in failed.detail
    window = json.loads(staged_host.ok(c.Identify(0xC0)).result.data)
    assert window["leases"] == 0
    assert staged(staged_host, predict(keep(ffn, 0.5))).unit_count == NEURONS // 2
