"""Spans of a bus: gaps are used, nothing is given out twice, commands slip in."""

import numpy as np
import pytest

from csd_device.bookings import BOOKINGS_MAX, BUSY, book, forget, make_bookings, slip, stream


def test_the_first_gap_that_fits_is_taken() -> None:
    bus = make_bookings(1)
    assert book(bus, 0, 100, 50, False) == 100
    assert book(bus, 0, 0, 50, False) == 0
    assert book(bus, 0, 0, 50, False) == 50
    assert book(bus, 0, 0, 1, False) == 150


def test_a_command_slips_in_at_the_next_boundary_and_the_bus_pays_behind_it() -> None:
    bus = make_bookings(1)
    book(bus, 0, 0, 100, False)
    book(bus, 0, 100, 100, False)
    assert slip(bus, 0, 30, 10) == 100
    assert slip(bus, 0, 100, 10) == 100
    assert book(bus, 0, 0, 100, False) == 220
    assert bus.lanes[0, BUSY] == 320


def test_commands_do_not_slip_in_front_of_each_other() -> None:
    bus = make_bookings(1)
    assert [slip(bus, 0, 0, 10) for _ in range(3)] == [0, 10, 20]


def test_lanes_are_apart() -> None:
    bus = make_bookings(2)
    assert book(bus, 0, 0, 50, False) == book(bus, 1, 0, 50, False) == 0


def test_nothing_goes_before_what_is_forgotten() -> None:
    bus = make_bookings(1)
    book(bus, 0, 10, 20, False)
    forget(bus, 0, 30)
    assert book(bus, 0, 0, 5, False) == 30


def test_a_stream_ends_with_its_last_part_or_when_the_lane_can() -> None:
    slow, fast = make_bookings(1), make_bookings(1)
    times = np.array([100, 200, 300, 400])
    stream(fast, 0, times, 40)
    assert times.tolist() == [110, 210, 310, 410]
    times = np.array([100, 200, 300, 400])
    stream(slow, 0, times, 4000)
    assert times.tolist() == [1100, 2100, 3100, 4100]


@pytest.mark.parametrize("seed", range(4))
def test_bookings_never_overlap_and_stay_bounded(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bus = make_bookings(1)
    taken = []
    for _ in range(3 * BOOKINGS_MAX):
        ready, length = int(rng.integers(0, 100_000)), int(rng.integers(1, 40))
        start = book(bus, 0, ready, length, bool(rng.integers(2)))
        assert start >= ready
        taken.append((start, start + length))
    taken.sort()
    assert all(one[1] <= other[0] for one, other in zip(taken, taken[1:], strict=False))
    assert bus.lanes[0, BUSY] == sum(end - start for start, end in taken)
