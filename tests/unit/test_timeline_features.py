"""Page types, status cycles, cache reads, read priority and suspends, as equations."""

from typing import Any

import numpy as np
import pytest

from csd_device.config import CellTiming, Geometry
from csd_device.nand import Timeline
from csd_device.nand.timeline import CHANNEL, DIE, ERASE, PROGRAM, READ

GEOMETRY = Geometry(
    channels=1,
    dies_per_channel=2,
    planes_per_die=2,
    blocks_per_plane=8,
    pages_per_block=64,
    page_bytes=16384,
)
PLAIN = {
    "read_ns": 60_000,
    "program_ns": 600_000,
    "erase_ns": 3_000_000,
    "command_ns": 300,
    "channel_mega_transfers_per_s": 1000,
    "channel_width_bits": 8,
}
SUSPEND = {
    "read_priority": True,
    "suspends_max": 2,
    "program_suspend_ns": 5_000,
    "erase_suspend_ns": 20_000,
    "resume_ns": 7_000,
}
READ_NS = 300 + 60_000 + 4096
PROGRAM_NS = 300 + 16384 + 600_000


def timeline(**figures: Any) -> Timeline:
    return Timeline(GEOMETRY, CellTiming.model_validate(PLAIN | figures))


def page(number: int, die: int = 0, plane: int = 0) -> int:
    """PPN of a page of block 0: one channel, then planes, then dies."""
    return (number * 2 + die) * 2 + plane


def read(line: Timeline, *ppns: int, at: int = 0) -> list[int]:
    return line.read_pages(at, np.array(ppns), np.full(len(ppns), 4096)).tolist()


def program(line: Timeline, *ppns: int, at: int = 0) -> list[int]:
    return line.program_pages(at, np.array(ppns), np.full(len(ppns), 16384)).tolist()


def test_tr_and_tprog_depend_on_the_type_of_the_page() -> None:
    figures = {"cell": "tlc", "read_ns": (10, 20, 30), "program_ns": (100, 200, 300)}
    for number in range(6):
        assert read(timeline(**figures), page(number)) == [300 + 10 * (number % 3 + 1) + 4096]
        done = program(timeline(**figures), page(number))
        assert done == [300 + 16384 + 100 * (number % 3 + 1)]


def test_extra_array_time_is_added_and_the_slowest_plane_counts() -> None:
    ppns, sizes = np.array([page(0), page(0, plane=1)]), np.full(2, 4096)
    done = timeline().read_pages(0, ppns, sizes, np.array([0, 5_000]))
    assert done.tolist() == [600 + 65_000 + 4096, 600 + 65_000 + 2 * 4096]


def test_status_cycles_come_when_the_array_is_done() -> None:
    assert read(timeline(status_ns=150), page(0)) == [READ_NS + 150]
    together = read(timeline(status_ns=150), page(0), page(0, plane=1))
    assert together == [READ_NS + 300 + 150, READ_NS + 300 + 150 + 4096]
    assert program(timeline(status_ns=150), page(0)) == [PROGRAM_NS + 150]


def test_planes_are_programmed_and_erased_together() -> None:
    done = program(timeline(), page(0), page(0, plane=1))
    assert done == [2 * (300 + 16384) + 600_000] * 2
    erased = timeline().erase_blocks(0, np.array([page(0), page(0, plane=1)]))
    assert erased.tolist() == [600 + 3_000_000] * 2


def test_with_cache_reads_the_array_works_while_the_bus_moves() -> None:
    line = timeline(cache_read=True, cache_busy_ns=1_000)
    first, second, third = read(line, page(0), page(1), page(2))
    assert first == READ_NS
    # The command goes out when the first page lies in the cache register, ahead of its data.
    assert second == 60_300 + 300 + 60_000 + 1_000 + 4096
    assert third - second == 300 + 60_000 + 1_000


def test_a_page_waits_in_the_array_for_the_one_before_to_leave_its_register() -> None:
    line = timeline(cache_read=True, channel_mega_transfers_per_s=50)
    move_ns = 4096 * 1000 // 50
    done = read(line, page(0), page(1), page(2))
    assert np.diff(done).min() >= move_ns
    assert done[2] <= 300 + 60_000 + 3 * (move_ns + 300)


def test_without_priority_a_read_waits_for_all_that_came_before() -> None:
    line = timeline()
    program(line, page(0), page(1))
    assert read(line, page(9), at=50_000) == [2 * PROGRAM_NS + READ_NS]


def test_with_priority_a_read_waits_for_the_program_that_runs_only() -> None:
    line = timeline(read_priority=True)
    program(line, page(0), page(1))
    # The next program's command cycles are on the bus already; its tPROG is what moves back.
    assert read(line, page(9), at=50_000) == [PROGRAM_NS + 300 + READ_NS]
    assert line.idle_ns() == 2 * PROGRAM_NS + 300 + READ_NS


def test_a_program_is_suspended_for_a_read_and_ends_later_for_it() -> None:
    line = timeline(**SUSPEND)
    program(line, page(0))
    asked = 100_000
    assert read(line, page(9), at=asked) == [asked + 5_000 + READ_NS]
    assert line.idle_ns() == PROGRAM_NS + 5_000 + READ_NS + 7_000
    # What comes next on this die waits for it.
    late = line.idle_ns()
    assert program(line, page(1), at=asked) == [late + PROGRAM_NS]


def test_an_erase_takes_its_own_time_to_suspend() -> None:
    line = timeline(**SUSPEND)
    line.erase_blocks(0, np.array([page(0)]))
    assert read(line, page(9), at=1_000_000) == [1_000_000 + 20_000 + READ_NS]
    assert line.idle_ns() == 300 + 3_000_000 + 20_000 + READ_NS + 7_000


def test_reads_in_a_row_suspend_once() -> None:
    line = timeline(**SUSPEND)
    program(line, page(0))
    first, second = read(line, page(9), page(10), at=100_000)
    assert second - first == READ_NS
    assert line.idle_ns() == PROGRAM_NS + 5_000 + 2 * READ_NS + 7_000


def test_a_program_yields_so_often_and_no_more() -> None:
    line = timeline(**SUSPEND)
    program(line, page(0))
    for at in (100_000, 300_000):
        assert read(line, page(9), at=at) == [at + 5_000 + READ_NS]
    end = line.idle_ns()
    assert read(line, page(9), at=500_000) == [end + READ_NS]


def test_a_read_of_another_die_is_not_touched() -> None:
    line = timeline(**SUSPEND)
    program(line, page(0))
    assert read(line, page(0, die=1), at=100_000) == [100_000 + READ_NS]
    assert line.idle_ns() == PROGRAM_NS


def test_a_backlog_that_is_full_makes_its_oldest_final() -> None:
    line = timeline(**SUSPEND)
    ends = [program(line, page(number % 64))[0] for number in range(140)]
    (done,) = read(line, page(9))
    assert ends[11] < done < ends[13]


def test_pages_may_arrive_at_times_of_their_own() -> None:
    ppns, sizes = np.array([page(0), page(0, die=1)]), np.full(2, 4096)
    done = timeline().read_pages(np.array([500_000, 7]), ppns, sizes)
    assert done.tolist() == [500_000 + READ_NS, 7 + READ_NS]


def test_busy_times_are_the_work_done() -> None:
    line = timeline()
    read(line, page(0), page(1), page(0, die=1))
    busy = line.busy_times()
    assert busy.channel_ns.tolist() == [3 * (300 + 4096)]
    assert busy.die_ns[0] == 2 * READ_NS


def test_events_name_what_was_busy_when() -> None:
    line = timeline()
    line.record_events(100)
    read(line, page(0))
    (end,) = program(line, page(0, die=1), at=1_000_000)
    line.erase_blocks(9_000_000, np.array([page(0)]))
    events = line.take_events().tolist()
    assert [CHANNEL, 0, READ, 60_300, READ_NS] in events
    assert [DIE, 0, READ, 0, READ_NS] in events
    assert [DIE, 1, PROGRAM, 1_000_000, end] in events
    assert [DIE, 0, ERASE, 9_000_000, 9_000_000 + 300 + 3_000_000] in events
    assert line.take_events().size == 0


@pytest.mark.parametrize("seed", range(4))
def test_mixed_work_never_puts_two_things_on_a_die_at_once(seed: int) -> None:
    """By the backlog's own account, whatever reads did to it."""
    rng = np.random.default_rng(seed)
    line = timeline(**SUSPEND)
    now = 0
    for _ in range(300):
        now += int(rng.integers(0, 300_000))
        ppn = page(int(rng.integers(64)), int(rng.integers(2)))
        if rng.integers(3):
            assert read(line, ppn, at=now)[0] >= now + READ_NS
        else:
            program(line, ppn, at=now)
        backlog = line.state.backlog
        for die in range(2):
            spans = backlog.spans[die, : backlog.counts[die], :2].reshape(-1)
            assert (np.diff(spans) >= 0).all()
