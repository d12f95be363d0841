"""The unit cache against a dictionary, its eviction, and its counters."""

import numpy as np
import pytest

from csd_device.dram import UnitCache
from csd_device.dram.unit_cache import HELD, HOLD_TURNS

MIB = 1 << 20


def _data(key: tuple[int, int], units: np.ndarray, unit_bytes: int) -> np.ndarray:
    """Bytes that name key and unit."""
    seed = (units.astype(np.int64) * 7 + key[0] * 31 + key[1] * 17)[:, None]
    return ((seed + np.arange(unit_bytes)) % 251).astype(np.uint8)


def _units(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint32)


def _fetch(cache: UnitCache, key: tuple[int, int], units: np.ndarray, size: int) -> np.ndarray:
    """Rows of what is cached; checks each against its name. The mask of hits."""
    slots = cache.lookup(key, units)
    hit = np.flatnonzero(slots >= 0)
    out = np.zeros((units.size, size), np.uint8)
    cache.copy_out(key, slots[hit], out, hit)
    assert (out[hit] == _data(key, units[hit], size)).all()
    assert not out[slots < 0].any()
    return slots >= 0


def test_hits_and_misses() -> None:
    cache = UnitCache(4 * MIB)
    units = _units(1, 5, 9)
    assert not _fetch(cache, (1, 0), units, 3456).any()
    assert cache.insert((1, 0), units, _data((1, 0), units, 3456)) == 3
    assert _fetch(cache, (1, 0), _units(0, 1, 5, 6, 9, 4000), 3456).tolist() == [
        False, True, True, False, True, False,
    ]  # fmt: skip
    assert not _fetch(cache, (1, 1), units, 3456).any()
    assert (cache.hits, cache.misses) == (3, 9)
    assert cache.used_bytes == 3 * 3456


def test_room_that_is_not_owned_holds_nothing_and_is_taken_again() -> None:
    cache = UnitCache(4 * MIB)
    for _ in range(3):
        room = cache.claim((1, 0), np.arange(1024, dtype=np.uint32), 4096)
        assert room.units.size == 1024
        assert not _fetch(cache, (1, 0), _units(0, 1023), 4096).any()
        assert cache.used_bytes == 0


def test_rooms_start_at_multiples_of_a_line() -> None:
    room = UnitCache(4 * MIB).claim((1, 0), _units(3, 4), 128)
    assert ((room.keep.starts + room.keep.memory.ctypes.data) % 64 == 0).all()


def test_drop_forgets_one_site_and_drop_model_all_of_one() -> None:
    cache = UnitCache(4 * MIB)
    for key in ((1, 0), (1, 1), (2, 0)):
        cache.insert(key, _units(0, 1), _data(key, _units(0, 1), 64))
    cache.drop((1, 0))
    cache.drop((9, 9))
    assert not _fetch(cache, (1, 0), _units(0, 1), 64).any()
    assert _fetch(cache, (1, 1), _units(0, 1), 64).all()
    cache.drop_model(1)
    assert not _fetch(cache, (1, 1), _units(0, 1), 64).any()
    assert _fetch(cache, (2, 0), _units(0, 1), 64).all()
    cache.clear()
    assert cache.used_bytes == 0


def test_hit_units_survive_a_scan() -> None:
    cache = UnitCache(1 * MIB)  # 256 units
    hot = np.arange(32, dtype=np.uint32)
    cache.insert((1, 0), hot, _data((1, 0), hot, 4096))
    for start in range(1000, 1600, 100):
        _fetch(cache, (1, 0), hot, 4096)
        scan = np.arange(start, start + 100, dtype=np.uint32)
        cache.insert((1, 0), scan, _data((1, 0), scan, 4096))
    assert _fetch(cache, (1, 0), hot, 4096).all()


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_a_scan_that_comes_back_finds_what_there_is_room_for(share: float) -> None:
    cache, units = UnitCache(4 * MIB), np.arange(int(4 * MIB / 1024 / share), dtype=np.uint32)
    for round_number in range(9):
        before, per_part = cache.hits, []
        for part in np.array_split(units, 40):
            missing = part[cache.lookup((1, 0), part) < 0]
            per_part.append(cache.hits - before)
            cache.own(cache.claim((1, 0), missing, 1024, units.size * 1024))
        found = cache.hits - before
        assert found == 0 if not round_number else found > 0.6 * share * units.size
    assert found > 0.85 * share * units.size
    in_parts = np.diff(per_part, prepend=0)  # evenly, so that NAND works all the time
    assert np.median(np.abs(in_parts - in_parts.mean())) < 0.2 * in_parts.mean()


def test_a_scan_gives_way_to_another() -> None:
    cache, units = UnitCache(4 * MIB), np.arange(6000, dtype=np.uint32)
    for site in (0, 1):
        for _ in range(100):
            missing = units[cache.lookup((1, site), units) < 0]
            cache.own(cache.claim((1, site), missing, 1024, 6000 * 1024))
    assert np.count_nonzero(cache.lookup((1, 1), units) >= 0) > 3000


def test_more_than_fits_keeps_the_first() -> None:
    cache = UnitCache(1 * MIB)
    units = np.arange(300, dtype=np.uint32)
    assert cache.insert((1, 0), units, _data((1, 0), units, 4096)) == 256
    assert _fetch(cache, (1, 0), units, 4096)[:256].all()


def test_all_hit_and_all_replaced() -> None:
    cache = UnitCache(1 * MIB)
    first = np.arange(256, dtype=np.uint32)
    cache.insert((1, 0), first, _data((1, 0), first, 4096))
    _fetch(cache, (1, 0), first, 4096)
    other = np.arange(1000, 1256, dtype=np.uint32)
    assert cache.insert((1, 0), other, _data((1, 0), other, 4096)) == 256
    assert _fetch(cache, (1, 0), other, 4096).all()
    assert not _fetch(cache, (1, 0), first, 4096).any()


def test_a_new_size_gets_room_from_another() -> None:
    cache = UnitCache(2 * MIB)
    units = np.arange(512, dtype=np.uint32)
    cache.insert((1, 0), units, _data((1, 0), units, 4096))
    assert cache.insert((1, 1), _units(7), _data((1, 1), _units(7), 1000)) == 1
    assert _fetch(cache, (1, 1), _units(7), 1000).all()
    assert _fetch(cache, (1, 0), units, 4096).sum() == 256  # the other of two slabs


def test_a_size_that_is_asked_for_takes_what_another_no_longer_needs() -> None:
    cache, scan = UnitCache(8 * MIB), np.arange(3000, dtype=np.uint32)
    rows = np.arange(4000, dtype=np.uint32)
    cache.insert((1, 0), rows, _data((1, 0), rows, 2048))  # once, as a host loads what stays there
    hits = []
    for token in range(8):
        row = rows[token : token + 1]
        if cache.lookup((1, 0), row)[0] < 0:
            cache.insert((1, 0), row, _data((1, 0), row, 2048))
        before = cache.hits
        for part in np.array_split(scan, 10):
            missing = part[cache.lookup((1, 1), part) < 0]
            room = cache.claim((1, 1), missing, 4096, scan.size * 4096)
            cache.own(room)
        hits.append(cache.hits - before)
    assert hits[0] == 0
    assert min(hits[3:]) > 0.9 * (7 * MIB / 4096)
    assert max(hits) <= 8 * MIB / 4096


@pytest.mark.parametrize("seed", range(3))
def test_slabs_that_change_their_size_never_give_wrong_bytes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = UnitCache(6 * MIB)
    sizes = {0: 1024, 1: 3072, 2: 65536, 3: 4096}
    for _ in range(300):
        site = int(rng.integers(0, 4))
        units = np.unique(rng.integers(0, 2000, int(rng.integers(1, 400)))).astype(np.uint32)
        hit = _fetch(cache, (1, site), units, sizes[site])
        missing = units[~hit]
        cache.insert((1, site), missing, _data((1, site), missing, sizes[site]))
        if rng.random() < 0.1:
            cache.hold((1, site), units[:20], is_new=False)
        assert cache.used_bytes <= 6 * MIB


@pytest.mark.parametrize("capacity", [0, 1000])
def test_no_capacity_caches_nothing(capacity: int) -> None:
    cache = UnitCache(capacity)
    assert cache.insert((1, 0), _units(1), _data((1, 0), _units(1), 64)) == 0
    assert not _fetch(cache, (1, 0), _units(1), 64).any()


def test_a_unit_larger_than_a_slab_is_not_kept() -> None:
    cache = UnitCache(8 * MIB)
    assert cache.insert((1, 0), _units(0), np.zeros((1, 2 * MIB), np.uint8)) == 0


@pytest.mark.parametrize("seed", range(4))
def test_never_gives_wrong_bytes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = UnitCache(4 * MIB)
    sizes = {(1, 0): 3456, (1, 1): 3456, (1, 2): 20_000, (2, 0): 1152}
    keys = list(sizes)
    for _ in range(150):
        key = keys[rng.integers(len(keys))]
        units = np.unique(rng.integers(0, 900, rng.integers(1, 300)).astype(np.uint32))
        hit = _fetch(cache, key, units, sizes[key])
        cache.insert(key, units[~hit], _data(key, units[~hit], sizes[key]))
        if rng.random() < 0.05:
            cache.drop(key)
        assert cache.used_bytes <= cache.capacity_bytes


def _bring(cache: UnitCache, key: tuple[int, int], units: np.ndarray, size: int = 4096) -> None:
    cache.insert(key, units, _data(key, units, size))
    cache.hold(key, units, is_new=True)


def test_what_is_held_is_not_evicted_until_it_was_used() -> None:
    cache = UnitCache(1 * MIB)  # 256 units
    near = np.arange(100, dtype=np.uint32)
    _bring(cache, (1, 0), near)
    assert cache.room(4096, 300) == 156
    for start in range(0, 1000, 200):
        scan = np.arange(start, start + 200, dtype=np.uint32)
        assert cache.insert((1, 9), scan, _data((1, 9), scan, 4096)) == 156
        cache.drop((1, 9))
    assert _fetch(cache, (1, 0), near[:60], 4096).all()  # ends the hold of the others too
    assert cache.room(4096, 300) == 256
    assert (cache.brought, cache.brought_used) == (100, 60)


def test_what_goes_further_ahead_never_evicts_what_is_nearer() -> None:
    cache = UnitCache(1 * MIB)
    for layer in range(4):
        units = np.arange(100, dtype=np.uint32)
        _bring(cache, (1, layer), units[: cache.room(4096, 100)])
    assert cache.room(4096, 1) == 0
    assert cache.insert((1, 5), _units(1), _data((1, 5), _units(1), 4096)) == 0
    held = [int(_fetch(cache, (1, layer), units, 4096).sum()) for layer in range(4)]
    assert held == [100, 100, 56, 0]


def test_a_hold_of_units_that_nobody_asks_for_ends() -> None:
    cache = UnitCache(1 * MIB)
    _bring(cache, (1, 0), np.arange(256, dtype=np.uint32))
    for _ in range(HOLD_TURNS):
        assert cache.room(4096, 256) == 0
        cache.lookup((1, 1), _units(0))
    assert cache.room(4096, 256) == 256
    assert (cache.brought, cache.brought_used) == (256, 0)


def test_held_slabs_do_not_go_to_another_size() -> None:
    cache = UnitCache(1 * MIB)
    _bring(cache, (1, 0), np.arange(10, dtype=np.uint32))
    assert cache.insert((1, 1), _units(7), _data((1, 1), _units(7), 1000)) == 0
    assert _fetch(cache, (1, 0), np.arange(10, dtype=np.uint32), 4096).all()
    assert cache.insert((1, 1), _units(7), _data((1, 1), _units(7), 1000)) == 1


def test_dropping_a_site_ends_its_hold() -> None:
    cache = UnitCache(1 * MIB)
    _bring(cache, (1, 0), np.arange(256, dtype=np.uint32))
    cache.drop((1, 0))
    assert cache.room(4096, 256) == 256
    _bring(cache, (1, 1), np.arange(256, dtype=np.uint32))
    assert cache.room(4096, 256) == 0


def test_times_go_with_the_unit_that_is_in_a_slot() -> None:
    cache = UnitCache(1 * MIB)
    units = np.arange(256, dtype=np.uint32)
    cache.insert((1, 0), units, _data((1, 0), units, 4096))
    cache.set_ready((1, 0), _units(3, 4, 4000), 70)
    assert cache.ready_ns((1, 0), cache.lookup((1, 0), _units(2))) == 0
    assert cache.ready_ns((1, 0), cache.lookup((1, 0), _units(2, 3))) == 70
    cache.insert((1, 1), units, _data((1, 1), units, 4096))
    assert cache.ready_ns((1, 1), cache.lookup((1, 1), units)) == 0


@pytest.mark.parametrize("seed", range(4))
def test_holds_never_give_wrong_bytes_and_are_counted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = UnitCache(2 * MIB)
    keys = {(1, 0): 4096, (1, 1): 4096, (1, 2): 20_000}
    for _ in range(300):
        key = list(keys)[rng.integers(3)]
        units = np.unique(rng.integers(0, 300, rng.integers(1, 90)).astype(np.uint32))
        if rng.random() < 0.5:
            _fetch(cache, key, units, keys[key])
        slots = cache.hold(key, units, is_new=False)
        missing = units[slots < 0][: cache.room(keys[key], int((slots < 0).sum()))]
        assert cache.insert(key, missing, _data(key, missing, keys[key])) == missing.size
        assert (cache.hold(key, missing, is_new=True) >= 0).all()
        if rng.random() < 0.05:
            cache.drop(key)
        for sized in cache._classes.values():
            assert sized.held == np.count_nonzero(sized.marks >= HELD)
