"""Lookaheads that learn: bounded, settled once or followed, the same for the same samples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_client.runtime.lookahead import (
    LAYERS_MAX,
    SAMPLES,
    SETTLED_AFTER,
    Lookahead,
    Moves,
    Pace,
)
from host_client.runtime.refusals import RequestRefused

TIMES = st.integers(0, 1 << 50)


def told(ahead: Lookahead, host_ns: int, drive_ns: int, passes: int = 1) -> int:
    """Its layers after so many passes of one layer each."""
    for _ in range(passes):
        ahead.note_host(host_ns)
        ahead.note_drive(drive_ns)
        ahead.end_pass()
    return ahead.layers


@pytest.mark.parametrize(
    "host_ns, drive_ns, layers",
    [(100, 1, 1), (100, 100, 1), (100, 101, 2), (100, 350, 4), (100, 10_000, LAYERS_MAX)],
)
def test_it_asks_as_many_layers_ahead_as_the_drive_takes(host_ns, drive_ns, layers) -> None:
    assert told(Lookahead(3, Moves.ALWAYS), host_ns, drive_ns, 20) == layers
    assert told(Lookahead(3, Moves.ONCE), host_ns, drive_ns, SETTLED_AFTER) == layers


def test_one_that_follows_moves_a_layer_a_pass_and_comes_back() -> None:
    ahead = Lookahead(4, Moves.ALWAYS)
    assert [told(ahead, 100, 620) for _ in range(4)] == [5, 6, 7, 7]
    for _ in range(SAMPLES):  # what is older is forgotten
        told(ahead, 100, 150)
    assert ahead.layers == 2


def test_one_that_settles_moves_once() -> None:
    ahead = Lookahead(1, Moves.ONCE)
    assert [told(ahead, 100, 500) for _ in range(4)] == [1, 5, 5, 5]
    assert told(ahead, 100, 90, SAMPLES) == 5


def test_a_steady_one_stays_whatever_it_is_told() -> None:
    assert told(Lookahead.parse("3", 1), 1, 1 << 40, 10) == 3
    assert told(Lookahead.parse(0, 1), 1, 1 << 40, 10) == 0


def test_one_beyond_another_is_so_much_further() -> None:
    near = Lookahead(2)
    far = Lookahead(6, Moves.ALWAYS, near)
    assert far.lead == 4
    assert told(far, 100, 250, 10) == 5
    assert far.lead == 3
    assert Lookahead(1, beyond=Lookahead(3)).lead == 1


def test_a_single_slow_command_or_late_thread_moves_nothing() -> None:
    ahead = Lookahead(2, Moves.ALWAYS)
    told(ahead, 100, 150, 9)
    assert told(ahead, 10**9, 150) == 2
    assert told(ahead, 100, 10**12) == 2


def test_without_room_less_is_asked_for_and_with_room_more_again() -> None:
    ahead = Lookahead(4, Moves.ALWAYS)
    told(ahead, 100, 600, 5)
    assert ahead.layers == 6
    ahead.note_room(was_enough=False)
    assert told(ahead, 100, 600) == 5
    for _ in range(10):
        ahead.note_room(was_enough=False)
        told(ahead, 100, 600)
    assert ahead.layers == 1
    for _ in range(LAYERS_MAX):
        ahead.note_room(was_enough=True)
    assert told(ahead, 100, 600, 10) == 6


def test_without_samples_it_stays() -> None:
    ahead = Lookahead(4, Moves.ALWAYS)
    ahead.end_pass()
    ahead.note_host(1)
    ahead.end_pass()
    assert ahead.layers == 4


@given(
    st.sampled_from(Moves),
    st.integers(0, LAYERS_MAX),
    st.lists(st.tuples(TIMES, TIMES, st.booleans()), max_size=40),
)
def test_it_is_bounded_and_the_same_for_the_same_samples(moves, start, samples) -> None:
    paths = []
    for _ in range(2):
        ahead, path = Lookahead(start, moves), []
        for host_ns, drive_ns, was_enough in samples:
            ahead.note_room(was_enough)
            path.append(told(ahead, host_ns, drive_ns))
        assert all(0 <= layers <= LAYERS_MAX for layers in path)
        paths.append(path)
    assert paths[0] == paths[1]


@pytest.mark.parametrize("text", ["-1", "soon", "", "1.5", -1])
def test_what_is_no_lookahead_is_refused(text) -> None:
    with pytest.raises(RequestRefused, match="0 or more layers, or 'auto'"):
        Lookahead.parse(text, 1)


def test_the_pace_is_a_layers_time_without_what_was_waited() -> None:
    ticks = iter([100, 350, 500, 1000, 1300])
    pace = Pace(lambda: next(ticks))
    pace.begin()
    assert [pace.layer_ns(waited) for waited in (40, 90, 90)] == [None, 200, 150]
    pace.begin()
    assert [pace.layer_ns(waited) for waited in (90, 500)] == [None, 0]
