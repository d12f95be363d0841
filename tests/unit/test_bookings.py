"""Spans of a bus: gaps are used, nothing is given out twice, commands slip in."""

import numpy as np
import pytest

from csd_device.bookings import BOOKINGS_MAX, BUSY, book, forget, make_bookings, slip, stream


def test_what_is_free_is_taken_and_a_booking_may_be_split() -> None:
    bus = make_bookings(1)
    assert book(bus, 0, 100, 50, False) == 150
    assert book(bus, 0, 0, 50, False) == 50
    assert book(bus, 0, 20, 60, False) == 160  # 50 to 100, and 150 to 160
    assert book(bus, 0, 0, 1, False) == 161


def test_a_command_slips_in_at_the_next_boundary_and_the_bus_pays_behind_it() -> None:
    bus = make_bookings(1)
    book(bus, 0, 0, 100, False)
    book(bus, 0, 100, 100, False)
    assert slip(bus, 0, 30, 10) == 100
    assert slip(bus, 0, 100, 10) == 100
    assert book(bus, 0, 0, 100, False) == 320
    assert bus.lanes[0, BUSY] == 320


def test_commands_do_not_slip_in_front_of_each_other() -> None:
    bus = make_bookings(1)
    assert [slip(bus, 0, 0, 10) for _ in range(3)] == [0, 10, 20]


def test_lanes_are_apart() -> None:
    bus = make_bookings(2)
    assert book(bus, 0, 0, 50, False) == book(bus, 1, 0, 50, False) == 50


def test_nothing_goes_before_what_is_forgotten() -> None:
    bus = make_bookings(1)
    book(bus, 0, 10, 20, False)
    forget(bus, 0, 30)
    assert book(bus, 0, 0, 5, False) == 35


def test_a_stream_ends_with_its_last_part_or_when_the_lane_can() -> None:
    slow, fast = make_bookings(1), make_bookings(1)
    times = np.array([100, 200, 300, 400])
    stream(fast, 0, times, 40)
    assert times.tolist() == [110, 210, 310, 410]
    times = np.array([100, 200, 300, 400])
    stream(slow, 0, times, 4000)
    assert times.tolist() == [1100, 2100, 3100, 4100]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_lane_is_a_set_of_moments_given_out_once(seed: int, merge: bool) -> None:
    """Against the plainest model: one flag a nanosecond."""
    rng = np.random.default_rng(seed)
    bus = make_bookings(1)
    taken = np.zeros(40_000, bool)
    for _ in range(600):
        ready, length = int(rng.integers(0, 9_000)), int(rng.integers(1, 40))
        free = ready + np.flatnonzero(~taken[ready:])[:length]
        taken[free] = True
        assert book(bus, 0, ready, length, merge) == free[-1] + 1
    assert bus.lanes[0, BUSY] == np.count_nonzero(taken)


def test_more_bookings_than_are_remembered_push_the_floor_and_never_overlap() -> None:
    bus = make_bookings(1)
    for index in range(3 * BOOKINGS_MAX):
        assert book(bus, 0, index * 10, 5, False) == index * 10 + 5
    oldest = (2 * BOOKINGS_MAX - 1) * 10 + 5
    assert book(bus, 0, 0, 5, False) == oldest + 5
