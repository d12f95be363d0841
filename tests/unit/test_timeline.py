"""The NAND timeline against closed forms, against a plain model, and for fairness."""

import itertools

import numpy as np
import pytest

from csd_device.config import CellTiming, Geometry
from csd_device.nand import Timeline
from csd_device.nand.geometry import Place, first_ppns_of, locate, ppns_at

# Eight channels of four dies, as in the reference simulator of FACTS.md.
GEOMETRY = Geometry(
    channels=8,
    dies_per_channel=4,
    planes_per_die=2,
    blocks_per_plane=64,
    pages_per_block=64,
    page_bytes=16384,
)
TIMING = CellTiming(
    read_ns=60_000,
    program_ns=600_000,
    erase_ns=3_000_000,
    command_ns=290,
    channel_mega_transfers_per_s=1000,
    channel_width_bits=8,
)
READ_4K_NS = 290 + 60_000 + 4096


def _ppns(*places: tuple[int, int, int, int, int]) -> np.ndarray:
    """PPNs of (channel, die, plane, block, page)."""
    columns = np.array(places, np.int64).T
    return ppns_at(GEOMETRY, Place(*columns))


def _read(timeline: Timeline, ppns: np.ndarray, size: int = 4096, at: int = 0) -> list[int]:
    return timeline.read_pages(at, ppns, np.full(len(ppns), size, np.int64)).tolist()


def test_places_and_ppns_are_inverse() -> None:
    ppns = np.arange(0, GEOMETRY.pages, 37)
    assert (ppns_at(GEOMETRY, locate(GEOMETRY, ppns)) == ppns).all()


def test_sequential_pages_spread_over_channels_then_planes_then_dies() -> None:
    place = locate(GEOMETRY, np.arange(GEOMETRY.planes))
    assert place.channel[:8].tolist() == list(range(8))
    assert place.plane[:16].tolist() == [0] * 8 + [1] * 8
    assert (place.die == np.repeat(np.arange(4), 16)).all()
    assert (place.page == 0).all()
    assert (locate(GEOMETRY, first_ppns_of(GEOMETRY, 3)).block == 3).all()


def test_one_idle_read_is_the_closed_form() -> None:
    assert _read(Timeline(GEOMETRY, TIMING), np.array([5]), at=7) == [7 + READ_4K_NS]


def test_transfer_time_is_rounded_up() -> None:
    timing = TIMING.model_copy(update={"channel_mega_transfers_per_s": 2400})
    done = _read(Timeline(GEOMETRY, timing), np.array([0]))
    assert done == [290 + 60_000 + 1707]  # 4096 / 2.4 = 1706.67


def test_one_die_serves_one_command_at_a_time() -> None:
    ppns = _ppns((0, 0, 0, 0, 0), (0, 0, 0, 0, 1), (0, 0, 0, 0, 2))
    expected = [READ_4K_NS * turn for turn in (1, 2, 3)]
    assert _read(Timeline(GEOMETRY, TIMING), ppns) == expected


def test_planes_with_one_page_offset_share_a_command() -> None:
    together = _ppns((0, 0, 0, 0, 5), (0, 0, 1, 0, 5))
    assert _read(Timeline(GEOMETRY, TIMING), together) == [
        2 * 290 + 60_000 + 4096,
        2 * 290 + 60_000 + 2 * 4096,
    ]
    apart = _ppns((0, 0, 0, 0, 5), (0, 0, 1, 0, 6))
    assert _read(Timeline(GEOMETRY, TIMING), apart) == [READ_4K_NS, 2 * READ_4K_NS]


def test_dies_of_a_channel_overlap_and_share_the_bus() -> None:
    ppns = _ppns((0, 0, 0, 0, 0), (0, 1, 0, 0, 0))
    first = READ_4K_NS
    assert _read(Timeline(GEOMETRY, TIMING), ppns) == [first, first + 4096]


def test_channels_do_not_wait_for_each_other() -> None:
    ppns = _ppns(*[(0, 0, 0, 0, page) for page in range(50)], (1, 0, 0, 0, 0))
    assert _read(Timeline(GEOMETRY, TIMING), ppns)[-1] == READ_4K_NS


def test_an_idle_die_does_not_wait_for_a_busy_one_even_in_a_later_batch() -> None:
    timeline = Timeline(GEOMETRY, TIMING)
    _read(timeline, _ppns(*[(0, 0, 0, 0, page) for page in range(50)]))
    (done,) = _read(timeline, _ppns((0, 1, 0, 0, 0)))
    assert done <= READ_4K_NS + 290 + 4096


def test_a_later_batch_queues_behind_the_earlier_one_on_the_same_die() -> None:
    timeline = Timeline(GEOMETRY, TIMING)
    _read(timeline, np.array([0]))
    assert _read(timeline, np.array([0]), at=100) == [2 * READ_4K_NS]
    assert timeline.idle_ns() == 2 * READ_4K_NS


def test_saturated_dies_of_one_channel_progress_alike() -> None:
    ppns = _ppns(*[(0, die, 0, 0, page) for die in range(4) for page in range(40)])
    done = np.array(_read(Timeline(GEOMETRY, TIMING), ppns, size=65536)).reshape(4, 40)
    lag = done.max(axis=0) - done.min(axis=0)
    assert lag.max() <= 4 * (65536 + 290)


def test_random_reads_beat_lock_step_and_respect_the_bus() -> None:
    """FACTS.md: the reference's lock-step scheduling reaches 247,653; the bus allows 488,281."""
    rng = np.random.default_rng(1)
    done = _read(Timeline(GEOMETRY, TIMING), rng.integers(0, GEOMETRY.pages, 20_000), 16384)
    pages_per_s = 20_000 / (max(done) / 1e9)
    assert 300_000 < pages_per_s < 8 * 1e9 / 16384


def test_sequential_reads_come_near_the_bus() -> None:
    done = _read(Timeline(GEOMETRY, TIMING), np.arange(20_000), 16384)
    assert 20_000 * 16384 / max(done) > 0.95 * 8


def test_programs_and_erases_are_closed_forms() -> None:
    timeline = Timeline(GEOMETRY, TIMING)
    size = np.array([16384], np.int64)
    done = timeline.program_pages(0, np.array([0]), size)
    assert done.tolist() == [290 + 16384 + 600_000]
    done = timeline.erase_blocks(1_000_000, np.array([0]))
    assert done.tolist() == [1_000_000 + 290 + 3_000_000]
    ppns = _ppns((0, 0, 0, 1, 0), (0, 0, 1, 1, 0))
    planes = timeline.program_pages(9_000_000, ppns, np.repeat(size, 2))
    assert planes.tolist() == [9_000_000 + 2 * (290 + 16384) + 600_000] * 2


def test_the_same_calls_give_the_same_times() -> None:
    rng = np.random.default_rng(2)
    batches = [rng.integers(0, GEOMETRY.pages, 500) for _ in range(5)]
    one, other = Timeline(GEOMETRY, TIMING), Timeline(GEOMETRY, TIMING)
    for at, ppns in enumerate(batches):
        assert _read(one, ppns, at=at * 1000) == _read(other, ppns, at=at * 1000)


def test_nothing_to_do_is_nothing() -> None:
    assert _read(Timeline(GEOMETRY, TIMING), np.empty(0, np.int64)) == []


@pytest.mark.parametrize("seed", range(8))
def test_a_channel_never_moves_more_than_it_can(seed: int) -> None:
    """Whatever the batches and their order of arrival: in no span of time more than fits."""
    rng = np.random.default_rng(seed)
    timeline = Timeline(GEOMETRY, TIMING)
    moved: dict[int, list[tuple[int, int, int]]] = {}
    for _ in range(30):
        ppns = rng.integers(0, GEOMETRY.pages, rng.integers(1, 60))
        sizes = rng.integers(1, 5, ppns.size) * 4096
        arrival = int(rng.integers(0, 2_000_000))
        done = timeline.read_pages(arrival, ppns, sizes)
        assert (done >= arrival + 290 + 60_000 + sizes).all()
        for channel, end, size in zip(ppns % 8, done, sizes, strict=True):
            moved.setdefault(int(channel), []).append((arrival + 60_290, int(end), int(size)))
    for of_channel in moved.values():
        for since, _, _ in of_channel:
            ends = sorted((end, size) for ready, end, size in of_channel if ready >= since)
            sizes_so_far = itertools.accumulate(size for _, size in ends)
            for (end, _), size in zip(ends, sizes_so_far, strict=True):
                assert size <= end - since
