"""Targets to on-drive DRAM: what they bring and hold, and what time it takes."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from csd_device.clock import TimeMode
from csd_device.firmware import commands as c
from csd_device.firmware.selection import select_top
from csd_protocol.packed import Role
from csd_protocol.status import Status

HIDDEN, NEURONS, PROGRAM = 64, 96, 7
UNIT_BYTES = 3 * HIDDEN * 2


def hidden_state() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, HIDDEN)).astype(np.float32)


def named(site: int, *units: int, **settings: Any) -> c.Target:
    return c.Target(site, c.What.UNITS, units=np.array(units, np.uint32), **settings)


def predict(*targets: c.Target) -> c.PredictAndStage:
    return c.PredictAndStage(1, PROGRAM, 0, hidden_state(), targets)


def keep(site: int, fraction: float, **settings: Any) -> c.Target:
    return c.Target(site, c.What.KEEP, keep=fraction, **settings)


def page(host: Any, command: c.Command) -> dict[str, Any]:
    return json.loads(host.ok(command).result.data)


def window(host: Any) -> dict[str, Any]:
    return page(host, c.Identify(0xC0))


def sites_of(host: Any, command: c.Command) -> tuple[c.StagedSite, ...]:
    return host.ok(command).result.sites


@pytest.fixture
def timed_host(open_drive, make_host, packed, shadow):
    host = make_host(open_drive(TimeMode.VIRTUAL))
    host.pack(packed)
    host.load(PROGRAM, shadow)
    host.ok(c.Flush())
    host.ok(c.Stage(1, (named(0, 0),)))  # the model's tables are read
    host.ok(c.Release(()))
    host.drive.clock.advance_to(host.drive.idle_ns() + 10**9)
    return host


def test_units_lie_in_dram_for_a_later_command_and_take_no_lease(staged_host, packed):
    ffn = packed.find(Role.FFN, 1)
    (brought,) = sites_of(staged_host, predict(keep(ffn, 0.25, to_dram=True)))
    assert brought.to_dram
    assert (brought.unit_count, brought.units_from_dram) == (NEURONS // 4, 0)
    assert (brought.lease, brought.length_bytes, brought.units_no_room) == (0, 0, 0)
    assert brought.units.tolist() == brought.predicted.tolist()
    assert brought.nand_page_reads > 0
    assert window(staged_host)["leases"] == 0
    (staged,) = sites_of(staged_host, predict(keep(ffn, 0.25)))
    assert (staged.units_from_dram, staged.nand_page_reads) == (NEURONS // 4, 0)
    np.testing.assert_array_equal(staged_host.window(staged), packed.units[ffn][brought.units])


def test_what_is_there_already_is_not_read_again(staged_host, packed):
    ffn = packed.find(Role.FFN, 0)
    staged_host.ok(c.Stage(1, (named(ffn, 3, 4),)))
    (brought,) = sites_of(staged_host, c.Stage(1, (named(ffn, 2, 3, 4, 9, to_dram=True),)))
    assert (brought.unit_count, brought.units_from_dram) == (4, 2)
    assert brought.units.tolist() == [2, 3, 4, 9]


def test_residency_is_left_out_and_all_is_said_briefly(staged_host, packed):
    ffn = packed.find(Role.FFN, 0)
    flags = np.zeros(NEURONS, np.bool_)
    flags[:10] = True
    bitmap = np.packbits(flags, bitorder="little").tobytes()
    staged_host.ok(c.HostResidency(1, (c.SiteResidency(ffn, c.Held.BITMAP, bitmap),)))
    everything = c.Target(ffn, c.What.ALL, to_dram=True)
    (brought,) = sites_of(staged_host, c.Stage(1, (everything,)))
    assert brought.all_missing
    assert (brought.unit_count, brought.units.size) == (NEURONS - 10, 0)


def test_the_highest_scores_come_first_where_room_is_short(staged_host, packed, monkeypatch):
    ffn = packed.find(Role.FFN, 0)
    cache = staged_host.drive._controller.stager.cache
    monkeypatch.setattr(cache, "room", lambda unit_bytes, wanted: min(wanted, 5))
    (brought,) = sites_of(staged_host, predict(keep(ffn, 0.5, to_dram=True)))
    assert (brought.unit_count, brought.units_no_room) == (5, NEURONS // 2 - 5)
    best = staged_host.ok(c.ExecuteProgram(PROGRAM, 1, 0, hidden_state(), 5 / NEURONS)).result.units
    assert brought.units.tolist() == best.tolist()
    assert brought.predicted.size == NEURONS // 2


def test_without_a_unit_cache_nothing_has_room_and_nothing_fails(staged_host, packed):
    ffn = packed.find(Role.FFN, 0)
    staged_host.ok(c.MemoryRangeSet(1 << 20, 0))
    (brought,) = sites_of(staged_host, c.Stage(1, (named(ffn, 1, 2, to_dram=True),)))
    assert (brought.unit_count, brought.units_no_room) == (0, 2)
    assert (brought.nand_page_reads, brought.units.size) == (0, 0)


def test_both_kinds_in_one_command_and_one_run_of_the_program(staged_host, packed):
    near, far = packed.find(Role.FFN, 0), packed.find(Role.FFN, 1)
    staged, brought = sites_of(
        staged_host, predict(keep(near, 0.25), keep(far, 0.25, to_dram=True))
    )
    assert (staged.to_dram, brought.to_dram) == (False, True)
    assert staged.lease
    assert window(staged_host)["leases"] == 1
    np.testing.assert_array_equal(staged_host.window(staged), packed.units[near][staged.units])
    (later,) = sites_of(staged_host, predict(keep(far, 0.25)))
    assert later.units_from_dram == NEURONS // 4


def test_a_failing_command_leases_nothing_and_leaves_what_was_brought(staged_host, packed):
    far, near = packed.find(Role.FFN, 0), packed.find(Role.FFN, 1)
    failed = staged_host.run(c.Stage(1, (named(far, 1, 2, to_dram=True), named(near, 200))))
    assert failed.status is Status.NO_SITE
    assert window(staged_host)["leases"] == 0
    (staged,) = sites_of(staged_host, c.Stage(1, (named(far, 1, 2),)))
    assert staged.units_from_dram == 2


def test_a_gone_window_does_not_keep_units_from_dram(staged_host, packed):
    ffn = packed.find(Role.FFN, 0)
    fault = json.dumps({"name": "window_loss", "settings": {}}).encode()
    staged_host.ok(c.SetFeatures(0xC0, 0, fault))
    assert staged_host.run(c.Stage(1, (named(ffn, 1),))).status is Status.WINDOW_UNAVAILABLE
    (brought,) = sites_of(staged_host, c.Stage(1, (named(ffn, 1, to_dram=True),)))
    assert brought.unit_count == 1


def test_damaged_units_are_left_out_counted_and_told_when_they_are_wanted(staged_host, packed):
    ffn = packed.find(Role.FFN, 1)
    site = packed.manifest.sites[ffn]
    at = site.offset_bytes + 40 * site.unit_bytes
    data = bytearray(staged_host.ok(c.Read(c.BlockRange(at // 4096, 1))).result.data)
    data[at % 4096] ^= 1
    staged_host.ok(c.Write(at // 4096, bytes(data)))
    (brought,) = sites_of(staged_host, c.Stage(1, (named(ffn, 39, 40, 41, to_dram=True),)))
    assert (brought.units.tolist(), brought.units_lost) == ([39, 41], 1)
    assert page(staged_host, c.GetLogPage(0x02))["media_errors"] == 1
    failed = staged_host.run(c.Stage(1, (named(ffn, 39, 40, 41),)))
    assert failed.status is Status.GUARD_CHECK
    assert [part.units.tolist() for part in failed.result.lost] == [[40]]


def test_copies_serve_what_goes_to_dram(make_host, open_drive, packed_twice):
    host = make_host(open_drive())
    host.pack(packed_twice)
    ffn = packed_twice.find(Role.FFN, 0)
    elsewhere = (c.Elsewhere(1, np.array([2, 7], np.uint32)),)
    target = named(ffn, 2, 5, 7, to_dram=True, elsewhere=elsewhere)
    (brought,) = sites_of(host, c.Stage(1, (target,)))
    assert (brought.unit_count, brought.units_from_copies) == (3, 2)
    (staged,) = sites_of(host, c.Stage(1, (named(ffn, 2, 5, 7),)))
    assert staged.units_from_dram == 3
    np.testing.assert_array_equal(host.window(staged), packed_twice.units[ffn][[2, 5, 7]])


def test_logs_and_counters_tell_staged_from_brought(staged_host, packed):
    ffn = packed.find(Role.FFN, 0)
    before = page(staged_host, c.GetLogPage(0x02))
    staged_host.ok(c.Stage(1, (named(ffn, 1, 2, 3, to_dram=True),)))
    log = page(staged_host, c.GetLogPage(0xC0))
    totals = log["totals"]
    assert (totals["units_staged"], totals["units_from_dram"], totals["units_to_dram"]) == (0, 0, 3)
    assert totals["staged_bytes"] == 0 < totals["nand_page_reads"]
    assert log["entries"][0]["sites"][0]["to_dram"]
    smart = page(staged_host, c.GetLogPage(0x02))
    assert smart["staged_bytes"] == before["staged_bytes"]
    assert smart["nand_page_reads"] == before["nand_page_reads"] + totals["nand_page_reads"]
    staged_host.ok(c.Stage(1, (named(ffn, 2, 3, 4),)))
    cache = page(staged_host, c.GetLogPage(0x07))["unit_cache"]
    assert (cache["brought"], cache["brought_used"]) == (3, 2)


# ---- time ------------------------------------------------------------------------------------


def test_time_is_nand_and_dram_without_the_link(timed_host, packed):
    """One unit of one sector: T = f + tCMD + tR + tST + x(4096) + D(unit)."""
    ffn = packed.find(Role.FFN, 0)
    config = timed_host.drive.config
    done = timed_host.ok(c.Stage(1, (named(ffn, 8, to_dram=True),)))
    (brought,), timing = done.result.sites, done.timing
    assert brought.nand_page_reads == 1
    moved_ns = -(-UNIT_BYTES * 10**9 // config.dram.bandwidth_bytes_per_s)
    flash = config.timing
    sector_ns = int(timed_host.drive._controller.time.nand.moves_ns(np.array([4096]))[0])
    flash_ns = flash.command_ns + flash.read_ns + flash.status_ns + sector_ns
    assert (timing.nand_ns, timing.dram_ns, timing.link_ns) == (flash_ns, moved_ns, 0)
    assert timing.done_ns - timing.submitted_ns == config.link.firmware_ns + flash_ns + moved_ns
    assert brought.ready_ns == timing.done_ns
    again = timed_host.ok(c.Stage(1, (named(ffn, 8, to_dram=True),))).timing
    assert (again.nand_ns, again.dram_ns, again.link_ns) == (0, 0, 0)


def test_time_of_units_that_are_there_is_dram_and_link(timed_host, packed):
    """T = f + D(2 k u) + L(k u)."""
    ffn = packed.find(Role.FFN, 0)
    config, units = timed_host.drive.config, range(10, 50)
    timed_host.ok(c.Stage(1, (named(ffn, *units, to_dram=True),)))
    done = timed_host.ok(c.Stage(1, (named(ffn, *units),)))
    (staged,), timing = done.result.sites, done.timing
    moved_ns = -(-2 * 40 * UNIT_BYTES * 10**9 // config.dram.bandwidth_bytes_per_s)
    link_ns = config.link.transfer_ns(staged.length_bytes)
    assert (timing.nand_ns, timing.dram_ns, timing.link_ns) == (0, moved_ns, link_ns)
    assert timing.done_ns - timing.submitted_ns == config.link.firmware_ns + moved_ns + link_ns


def test_a_command_does_not_wait_for_what_goes_to_dram(timed_host, packed):
    near, far = packed.find(Role.FFN, 0), packed.find(Role.FFN, 1)
    timed_host.ok(c.Stage(1, (named(near, *range(20), to_dram=True),)))
    targets = (named(near, *range(20)), named(far, *range(60), to_dram=True))
    done = timed_host.ok(c.Stage(1, targets))
    staged, brought = done.result.sites
    assert staged.ready_ns == done.timing.done_ns
    assert done.timing.nand_ns == 0
    assert brought.ready_ns > done.timing.done_ns


def test_who_comes_before_units_are_there_waits_for_them(timed_host, packed):
    """The same units, asked for again at once: no second read, and no sooner than the first."""
    ffn = packed.find(Role.FFN, 0)
    now_ns = timed_host.drive.clock.now_ns()
    queue = timed_host.queue
    queue.submit(1001, c.Stage(1, (named(ffn, *range(60), to_dram=True),)), now_ns)
    queue.submit(1002, c.Stage(1, (named(ffn, *range(60)),)), now_ns)
    first, second = sorted(queue.pop_due(1 << 62), key=lambda done: done.cid)
    (staged,) = second.result.sites
    assert (staged.units_from_dram, staged.nand_page_reads) == (60, 0)
    assert second.timing.done_ns > first.timing.done_ns
    assert second.timing.nand_ns > 0
    timing = second.timing
    parts = timing.queue_ns + timing.nand_ns + timing.dram_ns + timing.link_ns
    assert parts == timing.done_ns - timing.submitted_ns
    later = timed_host.ok(c.Stage(1, (named(ffn, *range(60)),))).timing
    assert later.nand_ns == 0


def test_a_second_command_takes_less_by_what_the_first_read(timed_host, packed):
    ffn, other = packed.find(Role.FFN, 0), packed.find(Role.FFN, 1)
    cold = timed_host.ok(predict(keep(other, 0.25))).timing
    timed_host.ok(predict(keep(ffn, 0.25, to_dram=True)))
    warm = timed_host.ok(predict(keep(ffn, 0.25))).timing
    assert warm.nand_ns == 0 < cold.nand_ns
    assert warm.program_ns == cold.program_ns
    assert warm.done_ns - warm.submitted_ns < cold.done_ns - cold.submitted_ns


def test_random_targets_of_both_kinds_against_the_obvious_model(staged_host, packed):
    """The window has the packed bytes, whatever was brought before; DRAM has what was said."""
    rng = np.random.default_rng(5)
    sites = [packed.find(Role.FFN, layer) for layer in range(2)]
    staged_host.ok(c.MemoryRangeSet(4 << 20, 1 << 20))
    for _ in range(150):
        targets = []
        for _ in range(int(rng.integers(1, 4))):
            units = np.sort(rng.choice(NEURONS, rng.integers(0, NEURONS), replace=False))
            target = named(sites[rng.integers(2)], *units)
            targets.append(replace(target, to_dram=bool(rng.random() < 0.5)))
        answers = sites_of(staged_host, c.Stage(1, tuple(targets)))
        for target, site in zip(targets, answers, strict=True):
            assert site.units.tolist() == target.units.tolist()
            assert site.to_dram == target.to_dram
            assert (site.lease != 0) == (not site.to_dram and target.units.size > 0)
            if site.lease:
                expected = packed.units[site.site][target.units]
                np.testing.assert_array_equal(staged_host.window(site), expected)
        staged_host.ok(c.Release(()))
    assert window(staged_host)["leases"] == 0


def test_selection_among_some_is_by_their_own_scores() -> None:
    scores = np.array([5, 1, 4, 2, 3], np.float32)
    units = np.array([1, 2, 3], np.uint32)
    assert units[select_top(scores[units], 2)].tolist() == [2, 3]
