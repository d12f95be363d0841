"""PREDICT_AND_STAGE and its kin: what lies in the window is what was packed, and nothing else."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csd_device.compute import load_program
from csd_device.firmware import commands as c
from csd_device.firmware.selection import kept_count, select_top
from csd_protocol.packed import Role
from csd_protocol.status import Status

HIDDEN, NEURONS = 64, 96
PROGRAM = 7


def u32(*units: int) -> np.ndarray:
    return np.array(units, np.uint32)


def hidden_state(seed: int = 0, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, HIDDEN)).astype(np.float32)


def keep(site: int, fraction: float) -> c.Target:
    return c.Target(site, c.What.KEEP, keep=fraction)


def named(site: int, *units: int, ignore: bool = False) -> c.Target:
    return c.Target(site, c.What.UNITS, units=u32(*units), ignore_residency=ignore)


def everything(site: int) -> c.Target:
    return c.Target(site, c.What.ALL)


def predict(*targets: c.Target, rows: int = 1) -> c.PredictAndStage:
    return c.PredictAndStage(1, PROGRAM, 0, hidden_state(rows=rows), targets)


def predict_by(program: int, hidden: np.ndarray) -> c.PredictAndStage:
    return c.PredictAndStage(1, program, 0, hidden, (keep(2, 0.5),))


def says(site: int, held: c.Held, bitmap: bytes = b"") -> c.HostResidency:
    return c.HostResidency(1, (c.SiteResidency(site, held, bitmap),))


def stage_log(host) -> dict:
    return json.loads(host.ok(c.GetLogPage(0xC0)).result.data)


def identify_window(host) -> dict:
    return json.loads(host.ok(c.Identify(0xC0)).result.data)


def hold(host, site: int, *units: int) -> None:
    flags = np.zeros(NEURONS, np.bool_)
    flags[list(units)] = True
    bitmap = np.packbits(flags, bitorder="little").tobytes()
    said = c.SiteResidency(site, c.Held.BITMAP, bitmap)
    host.ok(c.HostResidency(1, (said,)))


def test_predicted_units_are_the_programs_top_and_lie_in_the_window(staged_host, packed, shadow):
    ffn = packed.find(Role.FFN, 1)
    (site,) = staged_host.ok(predict(keep(ffn, 0.25))).result.sites
    program = load_program(np.frombuffer(bytearray(shadow), np.uint8))
    scores = program.score(1, hidden_state())
    expected = np.sort(np.argsort(-scores, kind="stable")[: NEURONS // 4])
    assert site.predicted.tolist() == expected.tolist()
    assert site.units.tolist() == expected.tolist()
    assert not site.all_missing
    np.testing.assert_array_equal(staged_host.window(site), packed.units[ffn][expected])


def test_several_rows_choose_by_the_maximum(staged_host, packed, shadow):
    ffn = packed.find(Role.FFN, 0)
    (site,) = staged_host.ok(predict(keep(ffn, 0.1), rows=5)).result.sites
    program = load_program(np.frombuffer(bytearray(shadow), np.uint8))
    scores = program.score(0, hidden_state(rows=5))
    assert set(site.predicted.tolist()) == set(np.argsort(-scores)[:10].tolist())


def test_what_the_host_holds_is_predicted_but_not_staged(staged_host, packed):
    ffn = packed.find(Role.FFN, 0)
    (before,) = staged_host.ok(predict(keep(ffn, 0.5))).result.sites
    held = before.predicted[::2].tolist()
    hold(staged_host, ffn, *held)
    (site,) = staged_host.ok(predict(keep(ffn, 0.5))).result.sites
    assert site.predicted.tolist() == before.predicted.tolist()
    assert site.units.tolist() == before.predicted[1::2].tolist()
    np.testing.assert_array_equal(staged_host.window(site), packed.units[ffn][site.units])


@pytest.mark.parametrize("first, end", [(0, 10), (5, None), (40, 41), (0, NEURONS)])
def test_a_range_of_all_units(staged_host, packed, first, end):
    ffn = packed.find(Role.FFN, 0)
    hold(staged_host, ffn, 7, 8)
    target = c.Target(ffn, c.What.ALL, first=first, end=end)
    (site,) = staged_host.ok(c.Stage(1, (target,))).result.sites
    expected = [unit for unit in range(NEURONS)[first:end] if unit not in (7, 8)]
    assert site.all_missing
    assert site.unit_count == len(expected)
    np.testing.assert_array_equal(staged_host.window(site), packed.units[ffn][expected])


@pytest.mark.parametrize("first, end", [(0, NEURONS + 1), (5, 5), (NEURONS, None), (9, 3)])
def test_a_range_that_is_none_is_refused(staged_host, packed, first, end):
    ffn = packed.find(Role.FFN, 0)
    target = c.Target(ffn, c.What.ALL, first=first, end=end)
    assert staged_host.run(c.Stage(1, (target,))).status is Status.NO_SITE


@pytest.mark.parametrize("fraction", [1.0, 2.0])
def test_keeping_everything_runs_no_program(staged_host, packed, fraction):
    ffn = packed.find(Role.FFN, 0)
    hold(staged_host, ffn, 0, 95)
    staged_host.ok(c.ProgramActivation(PROGRAM, False))
    (site,) = staged_host.ok(predict(keep(ffn, fraction))).result.sites
    assert site.all_missing
    assert site.units.size == site.predicted.size == 0
    assert site.unit_count == NEURONS - 2
    np.testing.assert_array_equal(staged_host.window(site), packed.units[ffn][1:95])


def test_all_and_named_targets_of_one_command(staged_host, packed):
    embed, kv, ffn = packed.find(Role.EMBED), packed.find(Role.KV, 1), packed.find(Role.FFN, 0)
    hold(staged_host, ffn, 3)
    targets = (named(embed, 0, 7, 49), everything(kv), named(ffn, 2, 3, ignore=True), named(ffn, 3))
    rows, tensor, ignoring, nothing = staged_host.ok(c.Stage(1, targets)).result.sites
    np.testing.assert_array_equal(staged_host.window(rows), packed.units[embed][[0, 7, 49]])
    np.testing.assert_array_equal(staged_host.window(tensor), packed.units[kv])
    assert tensor.all_missing
    assert ignoring.units.tolist() == [2, 3]
    assert (nothing.unit_count, nothing.lease, nothing.length_bytes) == (0, 0, 0)


def test_residency_all_then_none(staged_host, packed):
    ffn = packed.find(Role.FFN, 0)
    for held, expected in ((c.Held.ALL, 0), (c.Held.NONE, NEURONS)):
        staged_host.ok(c.HostResidency(1, (c.SiteResidency(ffn, held),)))
        (site,) = staged_host.ok(c.Stage(1, (everything(ffn),))).result.sites
        assert site.unit_count == expected


def test_a_second_read_comes_from_dram_and_mixes_with_nand(staged_host, packed):
    ffn = packed.find(Role.FFN, 0)
    first = staged_host.ok(c.Stage(1, (named(ffn, 1, 5, 9),))).result.sites[0]
    assert (first.units_from_dram, first.nand_page_reads > 0) == (0, True)
    mixed = staged_host.ok(c.Stage(1, (named(ffn, 0, 1, 2, 5, 8, 9),))).result.sites[0]
    assert mixed.units_from_dram == 3
    np.testing.assert_array_equal(staged_host.window(mixed), packed.units[ffn][[0, 1, 2, 5, 8, 9]])
    again = staged_host.ok(c.Stage(1, (named(ffn, 0, 1, 2),))).result.sites[0]
    assert (again.units_from_dram, again.nand_page_reads) == (3, 0)
    totals = stage_log(staged_host)["totals"]
    assert (totals["units_staged"], totals["units_from_dram"]) == (12, 6)


def test_a_changed_unit_fails_its_guard_check_and_leases_nothing(staged_host, packed):
    ffn = packed.find(Role.FFN, 1)
    site = packed.manifest.sites[ffn]
    at = site.offset_bytes + 40 * site.unit_bytes
    block = at // 4096
    data = bytearray(staged_host.ok(c.Read(c.BlockRange(block, 1))).result.data)
    data[at % 4096] ^= 1
    staged_host.ok(c.Write(block, bytes(data)))
    kv = packed.find(Role.KV, 0)
    failed = staged_host.run(c.Stage(1, (everything(kv), everything(ffn))))
    assert failed.status is Status.GUARD_CHECK
    assert "unit 40 of layers.1.ffn" in failed.detail
    assert failed.do_not_retry
    assert identify_window(staged_host)["leases"] == 0
    assert staged_host.ok(c.Stage(1, (named(ffn, 39, 41),))).result.sites[0].unit_count == 2
    smart = json.loads(staged_host.ok(c.GetLogPage(0x02)).result.data)
    assert smart["media_errors"] == 1


def test_a_full_window_leases_nothing_and_says_so(staged_host, packed):
    staged_host.ok(c.MemoryRangeSet(20 * 4096, 1 << 20))
    ffn, other = packed.find(Role.FFN, 0), packed.find(Role.FFN, 1)
    for _ in range(2):
        many = staged_host.run(c.Stage(1, tuple([everything(ffn), everything(other)] * 2)))
        assert many.status is Status.WINDOW_FULL
        assert not many.do_not_retry
        assert identify_window(staged_host)["leases"] == 0
    assert staged_host.ok(c.Stage(1, (everything(ffn),))).result.sites[0].unit_count == NEURONS


def test_releases_are_ones_own(staged_host, packed, make_host):
    ffn = packed.find(Role.FFN, 0)
    lease = staged_host.ok(c.Stage(1, (named(ffn, 1),))).result.sites[0].lease
    stranger = make_host(staged_host.drive, "stranger")
    assert stranger.run(c.Release((lease,))).status is Status.NO_LEASE
    assert staged_host.run(c.Release((lease + 99, lease))).status is Status.NO_LEASE
    assert identify_window(staged_host)["leases"] == 0
    for unit in range(3):
        staged_host.ok(c.Stage(1, (named(ffn, unit),)))
    staged_host.ok(c.Release(()))
    assert identify_window(staged_host)["leases"] == 0


@pytest.mark.parametrize(
    "command, status",
    [
        (c.Stage(2, ()), Status.NO_MODEL),
        (c.Stage(9, ()), Status.NO_MODEL),
        (c.Stage(1, (everything(5),)), Status.NO_SITE),
        (c.Stage(1, (named(0, 50),)), Status.NO_SITE),
        (c.Stage(1, (named(0, 4, 4),)), Status.NO_SITE),
        (c.Stage(1, (named(0, 5, 4),)), Status.NO_SITE),
        (c.Stage(1, (keep(2, 0.5),)), Status.INVALID_FIELD),
        (c.Stage(1, (named(0, 1),) * 6), Status.INVALID_FIELD),
        (predict(keep(2, float("nan"))), Status.INVALID_FIELD),
        (predict(keep(2, -0.5)), Status.INVALID_FIELD),
        (predict(keep(0, 0.5)), Status.INVALID_FIELD),
        (predict_by(7, np.ones((1, 9), np.float32)), Status.INVALID_FIELD),
        (predict_by(7, np.full((1, 64), np.nan, np.float32)), Status.INVALID_FIELD),
        (predict_by(8, hidden_state()), Status.NO_PROGRAM),
        (predict_by(256, hidden_state()), Status.INVALID_PROGRAM_INDEX),
        (says(2, c.Held.BITMAP, bytes(11)), Status.INVALID_FIELD),
        (says(77, c.Held.ALL), Status.NO_SITE),
        (c.ExecuteProgram(7, 1, 5, hidden_state(), 0.5), Status.NO_SITE),
        (c.ExecuteProgram(7, 1, 0, hidden_state(), 1.5), Status.INVALID_FIELD),
    ],
)  # fmt: skip
def test_bad_commands_have_their_status(staged_host, command, status):
    completion = staged_host.run(command)
    assert completion.status is status
    assert completion.detail
    assert identify_window(staged_host)["leases"] == 0


def test_an_inactive_program_does_not_run(staged_host):
    staged_host.ok(c.ProgramActivation(PROGRAM, False))
    assert staged_host.run(predict(keep(2, 0.5))).status is Status.PROGRAM_NOT_ACTIVATED


def test_execute_program_stages_nothing(staged_host, packed):
    ffn = packed.find(Role.FFN, 1)
    units = staged_host.ok(c.ExecuteProgram(PROGRAM, 1, 1, hidden_state(), 0.3)).result.units
    (site,) = staged_host.ok(predict(keep(ffn, 0.3))).result.sites
    assert units.tolist() == site.predicted.tolist()
    assert units.size == kept_count(0.3, NEURONS) == 29


def test_packing_again_is_noticed(staged_host, packed):
    """A rewritten model is read anew: its units, their CRCs, and not the cache's old ones."""
    ffn = packed.find(Role.FFN, 0)
    old = staged_host.ok(c.Stage(1, (everything(ffn),))).result.sites[0]
    offset, data = packed.writes[ffn]
    staged_host.write(offset, bytes(len(data)))
    changed = staged_host.run(c.Stage(1, (everything(ffn),)))
    assert changed.status is Status.GUARD_CHECK
    staged_host.write(offset, data)
    site = staged_host.ok(c.Stage(1, (everything(ffn),))).result.sites[0]
    assert site.units_from_dram == 0 == old.units_from_dram
    staged_host.ok(c.Format(0))
    assert staged_host.run(c.Stage(1, (everything(ffn),))).status is Status.NO_MODEL
    assert "model.1" not in identify_window(staged_host)["dram"]


@given(
    scores=st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.5]), min_size=1, max_size=40),
    share=st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_selection_is_the_stable_sort(scores, share):
    count = kept_count(share, len(scores))
    expected = sorted(np.argsort(-np.array(scores), kind="stable")[:count].tolist())
    assert select_top(np.array(scores, np.float32), count).tolist() == expected


def test_random_staging_against_the_obvious_model(staged_host, packed):
    """Whatever was staged before: the window has the packed bytes of what is asked and not held."""
    rng = np.random.default_rng(11)
    ffn = packed.find(Role.FFN, 0)
    held: set[int] = set()
    staged_host.ok(c.MemoryRangeSet(4 << 20, 1 << 20))
    for _ in range(120):
        if rng.random() < 0.2:
            held = set(rng.choice(NEURONS, rng.integers(0, NEURONS), replace=False).tolist())
            hold(staged_host, ffn, *held)
        asked = np.sort(rng.choice(NEURONS, rng.integers(0, NEURONS), replace=False))
        (site,) = staged_host.ok(c.Stage(1, (named(ffn, *asked),))).result.sites
        expected = [unit for unit in asked.tolist() if unit not in held]
        assert site.units.tolist() == expected
        if expected:
            np.testing.assert_array_equal(staged_host.window(site), packed.units[ffn][expected])
            staged_host.ok(c.Release((site.lease,)))
    assert identify_window(staged_host)["leases"] == 0
