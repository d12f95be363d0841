"""Queue pairs: depth, CIDs, order, Abort, events, and what goes back when one ends."""

import json

import numpy as np
import pytest

from csd_device.clock import TimeMode
from csd_device.errors import CommandError
from csd_device.firmware import commands as c
from csd_protocol.packed import Role
from csd_protocol.status import Status

FOREVER = 1 << 62


def lease_count(host) -> int:
    return json.loads(host.ok(c.Identify(0xC0)).result.data)["leases"]


def read(slba: int, blocks: int = 1) -> c.Read:
    return c.Read(c.BlockRange(slba, blocks))


def all_of(site: int) -> c.Stage:
    return c.Stage(1, (c.Target(site, c.What.ALL),))


def test_depth_is_a_bound(drive, make_host):
    host = make_host(drive, depth=2)
    cids = [host.submit(c.KeepAlive()) for _ in range(3)]
    assert host.queue.in_flight == 2
    statuses = {done.cid: done.status for done in host.queue.pop_due(FOREVER)}
    assert [statuses[cid] for cid in cids] == [
        Status.SUCCESS, Status.SUCCESS, Status.QUEUE_FULL,
    ]  # fmt: skip
    assert host.ok(c.KeepAlive())
    assert host.queue.completed == 4


def test_a_cid_in_flight_conflicts(host):
    host.queue.submit(5, c.KeepAlive(), 0)
    host.queue.submit(5, c.KeepAlive(), 0)
    statuses = [done.status for done in host.queue.pop_due(FOREVER)]
    assert sorted(status.name for status in statuses) == ["CID_CONFLICT", "SUCCESS"]
    host.queue.submit(70_000, c.KeepAlive(), 0)
    assert host.queue.pop_due(FOREVER)[0].status is Status.INVALID_FIELD


def test_wall_time_holds_completions_and_pops_out_of_order(open_drive, make_host):
    drive = open_drive(TimeMode.WALL)
    host = make_host(drive)
    host.queue.submit(1, c.Write(0, bytes(1 << 20)), 0)
    host.queue.submit(2, c.KeepAlive(), 0)
    assert host.queue.pop_due(0) == []
    first_due = host.queue.next_due_ns()
    assert [done.cid for done in host.queue.pop_due(first_due)] == [2]
    last_due = host.queue.next_due_ns()
    assert last_due > first_due
    assert host.queue.pop_due(last_due - 1) == []
    (write,) = host.queue.pop_due(last_due)
    assert write.timing.done_ns == last_due
    assert host.queue.next_due_ns() is None


def test_virtual_time_pops_at_once_and_moves_the_clock(open_drive, make_host):
    drive = open_drive(TimeMode.VIRTUAL)
    host = make_host(drive)
    done = host.ok(c.Write(0, bytes(4096)))
    assert drive.clock.now_ns() == done.timing.done_ns > 0
    later = host.ok(read(0))
    assert later.timing.submitted_ns == done.timing.done_ns


def test_one_idle_read_takes_the_closed_form(open_drive, make_host):
    drive = open_drive(TimeMode.VIRTUAL)
    host = make_host(drive)
    host.ok(c.Write(0, bytes(range(256)) * 16))
    timing = host.ok(read(0)).timing
    cells, link = drive.config.timing, drive.config.link
    assert timing.queue_ns == link.firmware_ns
    nand_ns = cells.command_ns + cells.read_ns + 4096 * 10**9 // cells.channel_bytes_per_s
    assert timing.nand_ns == nand_ns
    assert timing.link_ns == link.transfer_ns(4096)
    assert timing.program_ns == timing.dram_ns == 0


def test_the_parts_of_a_staging_command_add_up(open_drive, make_host, packed, shadow):
    host = make_host(open_drive(TimeMode.VIRTUAL))
    host.pack(packed)
    host.load(7, shadow)
    targets = tuple(
        c.Target(packed.find(Role.FFN, layer), c.What.KEEP, keep=0.5) for layer in range(2)
    )
    hidden = np.ones((1, 64), np.float32)
    for _ in range(3):
        done = host.ok(c.PredictAndStage(1, 7, 0, hidden, targets))
        time = done.timing
        parts = time.queue_ns + time.program_ns + time.nand_ns + time.dram_ns + time.link_ns
        assert parts == time.done_ns - time.submitted_ns
        assert max(site.ready_ns for site in done.result.sites) == time.done_ns
        assert time.program_ns > 0
        assert time.link_ns > 0
    assert time.nand_ns == 0


def test_the_same_commands_take_the_same_times(open_drive, make_host, packed, tmp_path):
    def run(drive) -> list[int]:
        host = make_host(drive)
        host.pack(packed)
        return [host.ok(all_of(site)).timing.done_ns for site in range(len(packed.units))]

    first = open_drive(TimeMode.VIRTUAL)
    times = run(first)
    first.close()
    (tmp_path / "drive.csd").rename(tmp_path / "old.csd")
    assert run(open_drive(TimeMode.VIRTUAL)) == times


def test_time_off_is_all_zero(host):
    assert host.ok(c.Write(0, bytes(4096))).timing == c.Timing()


def test_abort_stops_a_completion_and_gives_its_leases_back(staged_host, packed):
    staged = staged_host.submit(all_of(packed.find(Role.FFN, 0)))
    abort = staged_host.submit(c.Abort(staged))
    assert staged_host.queue.next_due_ns() is not None
    done = {completion.cid: completion for completion in staged_host.queue.pop_due(FOREVER)}
    assert done[staged].status is Status.ABORT_REQUESTED
    assert done[abort].result == c.Dword0(0)
    assert lease_count(staged_host) == 0
    assert staged_host.ok(c.Abort(staged)).result == c.Dword0(1)


def test_a_host_that_released_before_abort_loses_nothing_else(staged_host, packed):
    ffn = packed.find(Role.FFN, 0)
    kept = staged_host.ok(all_of(ffn)).result.sites[0]
    staged = staged_host.submit(all_of(ffn))
    staged_host.submit(c.Release((kept.lease + 1,)))
    staged_host.ok(c.Abort(staged))
    assert lease_count(staged_host) == 1


def test_event_requests_wait_are_limited_and_can_be_aborted(host):
    cids = [host.submit(c.AsyncEvent()) for _ in range(4)]
    assert host.run(c.AsyncEvent()).status is Status.ASYNC_EVENT_LIMIT
    assert host.queue.in_flight == 4
    aborted = host.submit(c.Abort(cids[0]))
    done = {completion.cid: completion.status for completion in host.queue.pop_due(FOREVER)}
    assert done == {cids[0]: Status.ABORT_REQUESTED, aborted: Status.SUCCESS}
    assert host.queue.next_due_ns() is None


def test_a_media_error_is_told_once_until_its_log_is_read(staged_host, packed):
    ffn = packed.find(Role.FFN, 0)
    staged_host.write(packed.writes[ffn][0], bytes(4096))
    requests = [staged_host.submit(c.AsyncEvent()) for _ in range(2)]
    told = []
    for _ in range(2):
        staged_host.submit(all_of(ffn))
        told += [done for done in staged_host.queue.pop_due(FOREVER) if done.cid in requests]
    assert [(event.cid, event.result.log_id) for event in told] == [(requests[0], 2)]
    staged_host.ok(c.GetLogPage(2))
    staged_host.submit(all_of(ffn))
    cids = [done.cid for done in staged_host.queue.pop_due(FOREVER)]
    assert requests[1] in cids


def test_the_last_queue_pair_of_a_host_takes_leases_and_residency_along(
    staged_host, packed, make_host
):
    drive, ffn = staged_host.drive, packed.find(Role.FFN, 0)
    staged_host.ok(c.HostResidency(1, (c.SiteResidency(ffn, c.Held.ALL),)))
    second = make_host(drive, "host")
    assert second.ok(all_of(ffn)).result.sites[0].unit_count == 0
    lease = second.ok(all_of(packed.find(Role.KV, 0))).result.sites[0].lease
    assert lease
    second.queue.close()
    other = make_host(drive, "other")
    assert lease_count(other) == 1
    staged_host.queue.close()
    staged_host.queue.close()
    assert lease_count(other) == 0
    again = make_host(drive, "host")
    assert again.ok(all_of(ffn)).result.sites[0].unit_count > 0


def test_leases_of_completions_never_popped_go_back(staged_host, packed, make_host):
    second = make_host(staged_host.drive, "host")
    second.submit(all_of(packed.find(Role.FFN, 0)))
    assert lease_count(staged_host) == 1
    second.queue.close()
    assert lease_count(staged_host) == 0


def test_connect_has_limits(drive, make_host):
    queues = [make_host(drive, f"h{number}") for number in range(drive.config.queues.max_queues)]
    with pytest.raises(CommandError, match=r"all 16 queue pairs"):
        make_host(drive, "one more")
    queues[3].queue.close()
    assert make_host(drive, "one more").queue.depth == drive.config.queues.max_depth
    with pytest.raises(CommandError, match=r"host identifier"):
        drive.connect("x", "", 0)
