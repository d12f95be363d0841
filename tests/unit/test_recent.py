"""Recent units: what is worth most stays, and how much memory that may take."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csd_protocol.packed import Role, Site, UnitKind
from host_client.runtime.quality import Quality
from host_client.runtime.recent import WORTH_KEPT, RecentSite
from host_client.runtime.recent_room import RecentRoom
from host_client.runtime.refusals import InvalidBudget, RequestRefused

NEURONS, HIDDEN = 40, 8
SITE = Site(
    site=3,
    role=Role.FFN,
    kind=UnitKind.NEURON,
    layer=1,
    count=NEURONS,
    rows=3,
    cols=HIDDEN,
    offset_bytes=0,
    first_crc=0,
    parts=(),
)
VALUES = np.random.default_rng(0).integers(0, 1 << 16, (NEURONS, 3 * HIDDEN), np.uint16)


def units(*numbers: int) -> np.ndarray:
    return np.array(sorted(numbers), np.uint32)


def decode(recent: RecentSite, predicted: np.ndarray) -> np.ndarray:
    """One token: what is not held is staged, and offered. Returns what was staged."""
    staged = predicted[~recent.held[predicted]]
    recent.choose(predicted)
    recent.keep(staged, VALUES[staged])
    return staged


def test_what_is_held_is_what_was_staged() -> None:
    recent = RecentSite(SITE, 6)
    assert recent.units.size == recent.values.shape[0] == 0
    assert not recent.held.any()
    decode(recent, units(2, 5, 30))
    assert sorted(recent.units.tolist()) == [2, 5, 30]
    assert np.flatnonzero(recent.held).tolist() == [2, 5, 30]
    np.testing.assert_array_equal(recent.values, VALUES[recent.units])


def test_a_choice_that_comes_again_is_staged_once() -> None:
    recent = RecentSite(SITE, 6)
    assert decode(recent, units(2, 5, 30)).tolist() == [2, 5, 30]
    for _ in range(3):
        assert decode(recent, units(2, 5, 30)).size == 0


def test_what_was_chosen_often_outlives_what_was_chosen_last() -> None:
    recent = RecentSite(SITE, 2)
    for _ in range(3):
        decode(recent, units(1, 2))
    decode(recent, units(1, 9))
    assert sorted(recent.units.tolist()) == [1, 2]
    for _ in range(30):
        decode(recent, units(9))
    assert sorted(recent.units.tolist()) == [1, 9]
    np.testing.assert_array_equal(recent.values, VALUES[recent.units])


def test_a_text_that_is_over_is_forgotten() -> None:
    recent = RecentSite(SITE, 2)
    for _ in range(50):
        decode(recent, units(1, 2))
    recent.forget()
    assert recent.units.size == 0
    decode(recent, units(7, 8))
    decode(recent, units(7, 8, 9))
    assert sorted(recent.units.tolist()) == [7, 8]


CHOICES = st.lists(st.sets(st.integers(0, NEURONS - 1), max_size=NEURONS), min_size=1, max_size=12)


@given(CHOICES, st.integers(1, NEURONS))
@settings(max_examples=60, deadline=None)
def test_the_worthiest_are_held_whatever_was_chosen(choices: list[set[int]], slots: int) -> None:
    """Against a dictionary of worths: nothing that was let go was worth more than what stayed."""
    recent, held = RecentSite(SITE, slots), set[int]()
    worth = {unit: np.float32(0) for unit in range(NEURONS)}
    for chosen in choices:
        decode(recent, units(*chosen))
        worth = {unit: was * WORTH_KEPT + (unit in chosen) for unit, was in worth.items()}
        candidates = held | chosen
        held = set(recent.units.tolist())
        assert held <= candidates
        assert len(held) == recent.units.size == min(slots, len(candidates))
        gone = [worth[unit] for unit in candidates - held]
        assert not gone or max(gone) <= min(worth[unit] for unit in held)
        np.testing.assert_array_equal(recent.values, VALUES[recent.units])


def test_parts_of_a_choice_may_come_one_after_the_other() -> None:
    whole, parted = RecentSite(SITE, 3), RecentSite(SITE, 3)
    decode(whole, units(1, 2, 3))
    decode(parted, units(1, 2, 3))
    decode(whole, units(1, 5, 6))
    parted.choose(units(1, 5, 6))
    for part in (units(5), units(6)):
        parted.keep(part, VALUES[part])
    assert sorted(parted.units.tolist()) == sorted(whole.units.tolist()) == [1, 5, 6]
    np.testing.assert_array_equal(parted.values, VALUES[parted.units])


@pytest.mark.parametrize(
    "text, room",
    [
        ("25%", RecentRoom(share=0.25)),
        (" 100 % ", RecentRoom(share=1.0)),
        ("1.5 MB", RecentRoom(size_bytes=1_500_000)),
        (4096, RecentRoom(size_bytes=4096)),
        ("0", RecentRoom()),
        (0, RecentRoom()),
        ("0%", RecentRoom()),
    ],
)
def test_room_is_a_share_or_a_size(text: str | int, room: RecentRoom) -> None:
    assert RecentRoom.parse(text) == room


@pytest.mark.parametrize("text", ["", "%", "much", "-1", "101%", "-5%", "nan%", -4096, "quarter"])
def test_what_is_no_room_is_refused_with_an_example(text: str | int) -> None:
    with pytest.raises(InvalidBudget, match=r"neither a size like 200MB, nor a share like 25%"):
        RecentRoom.parse(text)


def test_room_comes_to_slots() -> None:
    assert RecentRoom(share=0.25).slots(100, 1000) == 25
    assert RecentRoom(share=0.25).slots(3, 1000) == 0
    assert RecentRoom(size_bytes=5999).slots(100, 1000) == 5
    assert RecentRoom().slots(100, 1000) == 0


def test_where_recent_units_are_of_no_use_there_are_none() -> None:
    half = Quality.parse("0.5")
    assert RecentRoom.of("auto", half, is_mixture=False) == RecentRoom(share=0.25)
    assert RecentRoom.of("10%", half, is_mixture=False) == RecentRoom(share=0.1)
    for quality, is_mixture in (
        (Quality(), False),
        (Quality.parse("1+heads=0.5"), False),
        (half, True),
    ):
        for none in ("auto", "0", 0):
            assert RecentRoom.of(none, quality, is_mixture) == RecentRoom()
        with pytest.raises(RequestRefused, match=r"recent units of 25%: quality .* Ask for 0"):
            RecentRoom.of("25%", quality, is_mixture)
