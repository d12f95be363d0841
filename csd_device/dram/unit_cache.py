"""Units kept in on-drive DRAM after they were read from NAND.

The memory is divided into slabs; a slab holds slots of one unit size, so nothing fragments. Each
size has its own CLOCK (second chance): a hit marks a slot, the hand clears marks and takes the
first slot without one. New units come in unmarked, so a scan evicts itself before it evicts what
was hit. A scan that comes back (all of a model for each token) would find nothing of itself then:
where no slot is empty, only one in SCAN_ADMITS of its units comes in, and what is here is hit in
every round (bimodal insertion; Qureshi et al., ISCA 2007). Empty slots are given out evenly over
the scan, the same share of each part: NAND then works all the time, and not for the rest in one go.

For each (model, site) an int32 array says which slot each unit lies in. A size that has no empty
slot left takes a slab that is free, or else the one of another size in which nothing was found or
put for far longer than in any of its own: memory goes to the sizes that are being asked for.

What was brought here ahead of its use is *held*: nothing that comes later evicts it, be it read for
the window or brought for a layer further ahead, so that guesses about far layers never cost near
ones. A hold ends for a unit when it is used, and for all of a site when the site is next looked up:
its turn has come, and what is left of it was guessed wrong. Should that never happen, the hold ends
after HOLD_TURNS further lookups and holds of other sites.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from csd_device.checked_copy import LINE_BYTES, Keep
from csd_device.gather import gather

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Key = tuple[int, int]

SLAB_BYTES_MIN = 1 << 20
SLAB_BYTES_MAX = 16 << 20
SLABS_AIM = 64
SCAN_ADMITS = 64  # of so many units of a scan one takes another's place
STALE = 4  # times as long untouched as the needy size's own slabs: units of each token stay
HOLD_TURNS = 1024  # a few tokens' worth of targets
HIT, TAKEN, HELD, BROUGHT = 1, 2, 3, 4  # marks of a slot; 0: none. BROUGHT: held, and not used yet
_NO_SLOTS: I64 = np.empty(0, np.int64)
_NEVER = np.iinfo(np.int64).max


@njit(nogil=True, cache=True)
def _find_victims(marks: Any, hand: Any, slots: Any) -> Any:
    """Fills `slots` with the next unmarked ones, clearing marks on the way; the hand after it.

    A slot marked TAKEN stays so: the caller clears those. So does one that is held.
    """
    count = marks.shape[0]
    found = 0
    while found < slots.shape[0]:
        if marks[hand] == HIT:
            marks[hand] = 0
        elif marks[hand] == 0:
            marks[hand] = TAKEN
            slots[found] = hand
            found += 1
        hand = (hand + 1) % count
    return hand


@dataclass(frozen=True, slots=True)
class Room:
    """Slots that were claimed for units of one site."""

    key: Key
    unit_bytes: int
    units: U32
    slots: I64
    keep: Keep  # where the units go


class _SizeClass:
    """The slots of one unit size. A slot's owner is a number for its key, -1: empty."""

    def __init__(self, unit_bytes: int, slab_bytes: int) -> None:
        self.unit_bytes = unit_bytes
        self.per_slab = slab_bytes // unit_bytes
        self.slab_starts: I64 = np.empty(0, np.int64)
        self.owners: I32 = np.empty(0, np.int32)
        self.units: U32 = np.empty(0, np.uint32)
        self.marks: U8 = np.empty(0, np.uint8)
        self.ready_ns: I64 = np.empty(0, np.int64)  # when what comes from NAND is there
        self.touched: I64 = np.empty(0, np.int64)  # by slab: the last turn in which it was used
        self.held = 0  # slots that are held
        self.used = 0  # slots below this one were filled at least once
        self.hand = 0

    @property
    def slot_count(self) -> int:
        return int(self.owners.shape[0])

    @property
    def claimable(self) -> int:
        return self.slot_count - self.held

    def admitted(self, count: int, share: float) -> int:
        """How many of so many units of a scan come in; share: what there is room for of it."""
        empty = self.slot_count - self.used
        fresh = min(empty, math.ceil(count * min(1.0, share)))
        return fresh + max(0, count - empty) // SCAN_ADMITS

    def touch(self, slots: I64, turn: int) -> None:
        """Something was found in or put into these."""
        self.touched[slots // self.per_slab] = turn

    def oldest(self) -> tuple[int, int] | None:
        """The turn in which a slab without held slots was last touched, and which: the least."""
        turns = self.touched
        if self.held:
            is_held = (self.marks.reshape(-1, self.per_slab) >= HELD).any(axis=1)
            turns = np.where(is_held, _NEVER, turns)
        if not turns.size or turns.min() == _NEVER:
            return None
        return int(turns.min()), int(np.argmin(turns))

    def slots_of(self, slab: int) -> I64:
        return np.arange(slab * self.per_slab, (slab + 1) * self.per_slab)

    def remove_last_slab(self) -> int:
        """Takes it away, empty; where it starts."""
        start = int(self.slab_starts[-1])
        kept = self.slot_count - self.per_slab
        self.slab_starts, self.touched = self.slab_starts[:-1], self.touched[:-1]
        self.owners, self.units = self.owners[:kept], self.units[:kept]
        self.marks, self.ready_ns = self.marks[:kept], self.ready_ns[:kept]
        self.used = min(self.used, kept)
        self.hand = self.hand if self.hand < kept else 0
        return start

    def add_slab(self, start: int, turn: int) -> None:
        self.slab_starts = np.append(self.slab_starts, np.int64(start))
        self.touched = np.append(self.touched, np.int64(turn))
        self.owners = np.append(self.owners, np.full(self.per_slab, -1, np.int32))
        self.units = np.append(self.units, np.zeros(self.per_slab, np.uint32))
        self.marks = np.append(self.marks, np.zeros(self.per_slab, np.uint8))
        self.ready_ns = np.append(self.ready_ns, np.zeros(self.per_slab, np.int64))

    def starts(self, slots: I64) -> I64:
        """Byte addresses of slots."""
        return self.slab_starts[slots // self.per_slab] + slots % self.per_slab * self.unit_bytes

    def claim(self, count: int) -> I64:
        """`count` different slots to fill: never used ones first, then the clock's choice."""
        assert count <= self.claimable
        fresh = min(count, self.slot_count - self.used)
        slots = np.empty(count, np.int64)
        slots[:fresh] = np.arange(self.used, self.used + fresh)
        self.used += fresh
        if count > fresh:
            self.marks[slots[:fresh]] = TAKEN
            self.hand = int(_find_victims(self.marks, self.hand, slots[fresh:]))
            self.marks[slots] = 0
        return slots

    def mark(self, slots: I64, mark: int) -> U8:
        """Gives slots another mark; what they had [n]."""
        before = self.marks[slots]
        self.marks[slots] = mark
        held_before = int(np.count_nonzero(before >= HELD)) if self.held else 0
        self.held += (slots.size if mark >= HELD else 0) - held_before
        return before


class UnitCache:
    """At most `capacity_bytes` of units; memory is touched as it fills."""

    def __init__(self, capacity_bytes: int) -> None:
        """0: caches nothing."""
        self.capacity_bytes = capacity_bytes
        self.hits = 0
        self.misses = 0
        self.brought = 0  # units that were brought ahead of their use
        self.brought_used = 0  # those of them that were used then
        self._turn = 0
        self._holds: dict[Key, int] = {}  # by site with held units, oldest first: the last turn
        self._slab_bytes = min(max(capacity_bytes // SLABS_AIM, SLAB_BYTES_MIN), SLAB_BYTES_MAX)
        self._memory = _lines(capacity_bytes // self._slab_bytes * self._slab_bytes)
        self._free_slabs = list(range(0, len(self._memory), self._slab_bytes))[::-1]
        self._classes: dict[int, _SizeClass] = {}
        self._keys: list[Key | None] = []  # by owner number
        self._owner_of: dict[Key, int] = {}
        self._slots: dict[Key, I32] = {}  # by unit: slot, -1: not here
        self._unit_bytes: dict[Key, int] = {}

    @property
    def used_bytes(self) -> int:
        return sum(
            int(np.count_nonzero(sized.owners >= 0)) * sized.unit_bytes
            for sized in self._classes.values()
        )

    def lookup(self, key: Key, units: U32) -> I64:
        """The slot of each unit, -1 for a miss. Marks what it finds and counts hits and misses.

        What else is held of the site is no longer.
        """
        slots = self._find(key, units)
        found = slots[slots >= 0]
        if found.size:
            sized = self._classes[self._unit_bytes[key]]
            before = sized.mark(found, HIT)
            sized.touch(found, self._turn)
            if key in self._holds:
                self.brought_used += int(np.count_nonzero(before == BROUGHT))
        self.hits += int(found.size)
        self.misses += int(units.size - found.size)
        self._end_hold(key)
        self._next_turn()
        return slots

    def hold(self, key: Key, units: U32, is_new: bool) -> I64:
        """Holds those of the units that are here until they are used; their slots, -1: not here.

        `is_new`: they came for that reason, and are counted as brought.
        """
        slots = self._find(key, units)
        found = slots[slots >= 0]
        if found.size:
            sized = self._classes[self._unit_bytes[key]]
            sized.mark(found[sized.marks[found] < HELD], BROUGHT if is_new else HELD)
            sized.touch(found, self._turn)
            self.brought += found.size if is_new else 0
            self._holds.pop(key, None)
            self._holds[key] = self._turn + HOLD_TURNS
        self._next_turn()
        return slots

    def those_here(self, key: Key, units: U32) -> U32:
        """Those of the units that are here, in their order."""
        return units[self._find(key, units) >= 0]

    def room(self, unit_bytes: int, wanted: int) -> int:
        """How many units of this size, of so many, could come in now."""
        sized = self._size_class(unit_bytes, wanted)
        return 0 if sized is None else min(wanted, sized.claimable)

    def ready_ns(self, key: Key, slots: I64) -> int:
        """When the last of these is there; what was read for another command may be on its way."""
        if not slots.size:
            return 0
        return int(self._classes[self._unit_bytes[key]].ready_ns[slots].max())

    def set_ready(self, key: Key, units: U32, ready_ns: int) -> None:
        """Those of the units that are here have come from NAND then."""
        slots = self._find(key, units)
        found = slots[slots >= 0]
        if found.size:
            self._classes[self._unit_bytes[key]].ready_ns[found] = ready_ns

    def copy_out(self, key: Key, slots: I64, out: U8, rows: I64) -> None:
        """Copies the unit in slots[i] to out[rows[i]]; `out` is [n, unit_bytes], contiguous."""
        if not slots.size:
            return
        unit_bytes = self._unit_bytes[key]
        assert out.ndim == 2
        assert out.shape[1] == unit_bytes
        starts = self._classes[unit_bytes].starts(slots)
        lengths = np.full(slots.size, unit_bytes, np.int64)
        gather(self._memory, starts, lengths, rows * unit_bytes, out.reshape(-1))

    def claim(self, key: Key, units: U32, unit_bytes: int, scan_bytes: int | None = None) -> Room:
        """Room for the first of these units, as many as fit; none of them may be here.

        `scan_bytes`: they are a part of a scan of so much, and a share of them comes in.
        Whoever lay there is forgotten. To be filled and then owned, or left: the slots of a room
        that is not owned are taken again. A unit larger than a slab gets none.
        """
        assert self._unit_bytes.get(key, unit_bytes) == unit_bytes, "drop the key to change size"
        sized = self._size_class(unit_bytes, units.size)
        if sized is None:
            return Room(key, unit_bytes, units[:0], _NO_SLOTS, Keep(self._memory, _NO_SLOTS))
        wanted = min(units.size, sized.claimable)
        if scan_bytes is not None:
            wanted = sized.admitted(wanted, self.capacity_bytes / scan_bytes)
        slots = sized.claim(wanted)
        self._evict(sized, slots)
        sized.owners[slots] = -1
        keep = Keep(self._memory, sized.starts(slots))
        return Room(key, unit_bytes, units[: slots.size], slots, keep)

    def own(self, room: Room) -> None:
        """The units that were claimed for lie in their room now."""
        if room.units.size:
            self._own(room.key, self._classes[room.unit_bytes], room.units, room.slots)

    def insert(self, key: Key, units: U32, data: U8) -> int:
        """Keeps data[i] as unit units[i], as many as fit; none may be here. How many were kept."""
        assert data.ndim == 2
        assert data.shape[0] == units.size
        unit_bytes = int(data.shape[1])
        room = self.claim(key, units, unit_bytes)
        kept = np.arange(room.units.size) * unit_bytes
        lengths = np.full_like(kept, unit_bytes)
        gather(data.reshape(-1), kept, lengths, room.keep.starts, room.keep.memory)
        self.own(room)
        return int(kept.size)

    def drop(self, key: Key) -> None:
        """Forgets all units of one site."""
        slots = self._slots.pop(key, None)
        if slots is None:
            return
        sized = self._classes[self._unit_bytes.pop(key)]
        held = slots[slots >= 0].astype(np.int64)
        sized.owners[held] = -1
        sized.mark(held, 0)
        self._holds.pop(key, None)
        self._keys[self._owner_of.pop(key)] = None

    def drop_model(self, model: int) -> None:
        """Forgets all units of one model."""
        for key in [key for key in self._slots if key[0] == model]:
            self.drop(key)

    def clear(self) -> None:
        """Forgets everything; counters stay."""
        for key in list(self._slots):
            self.drop(key)

    def _find(self, key: Key, units: U32) -> I64:
        known = self._slots.get(key)
        slots = np.full(units.size, -1, np.int64)
        if known is not None:
            inside = units < known.size
            slots[inside] = known[units[inside]]
        return slots

    def _size_class(self, unit_bytes: int, wanted: int) -> _SizeClass | None:
        """The class of this size with room for `wanted` more where slabs can be had."""
        if unit_bytes > self._slab_bytes or not self._memory.size:
            return None
        sized = self._classes.get(unit_bytes)
        if sized is None:
            sized = self._classes[unit_bytes] = _SizeClass(unit_bytes, self._slab_bytes)
        while sized.slot_count - sized.used < wanted and (
            self._free_slabs or self._free_oldest_slab(sized)
        ):
            sized.add_slab(self._free_slabs.pop(), self._turn)
        return sized if sized.slot_count else None  # what there is is held

    def _free_oldest_slab(self, needy: _SizeClass) -> bool:
        """Frees the slab of another size that was not touched for longest.

        False: all are held, or were touched not much longer ago than those of the needy size.
        """
        others = [
            (*found, size)
            for size, sized in self._classes.items()
            if sized is not needy and (found := sized.oldest()) is not None
        ]
        if not others:
            return False
        turn, slab, size = min(others)
        own = needy.oldest()
        own_age = self._turn - own[0] if own else 0
        if needy.slot_count and self._turn - turn <= STALE * max(1, own_age):
            return False
        self._free_slab(self._classes[size], slab)
        return True

    def _free_slab(self, sized: _SizeClass, slab: int) -> None:
        """Forgets what lies in a slab; the last slab of its size takes its number."""
        here, last = sized.slots_of(slab), sized.slots_of(sized.slab_starts.size - 1)
        self._evict(sized, here)
        sized.owners[here] = -1
        if here[0] != last[0]:
            owners = sized.owners[last]
            for owner in np.unique(owners[owners >= 0]):
                key = self._keys[owner]
                assert key is not None
                moved = last[owners == owner]
                self._slots[key][sized.units[moved]] = here[owners == owner]
            for column in (sized.owners, sized.units, sized.marks, sized.ready_ns):
                column[here] = column[last]
            for column in (sized.slab_starts, sized.touched):
                column[[slab, -1]] = column[[-1, slab]]
        self._free_slabs.append(sized.remove_last_slab())

    def _evict(self, sized: _SizeClass, slots: I64) -> None:
        """Tells the owners of these slots that they lost them."""
        owners = sized.owners[slots]
        for owner in np.unique(owners[owners >= 0]):
            key = self._keys[owner]
            assert key is not None
            self._slots[key][sized.units[slots[owners == owner]]] = -1

    def _own(self, key: Key, sized: _SizeClass, units: U32, slots: I64) -> None:
        if key not in self._owner_of:
            self._owner_of[key] = self._new_owner(key)
            self._slots[key] = np.empty(0, np.int32)
            self._unit_bytes[key] = sized.unit_bytes
        known = self._slots[key]
        needed = int(units.max()) + 1
        if needed > known.size:
            known = np.append(known, np.full(max(needed, 64) - known.size, -1, np.int32))
            self._slots[key] = known
        known[units] = slots
        sized.touch(slots, self._turn)
        sized.owners[slots] = self._owner_of[key]
        sized.units[slots] = units
        sized.marks[slots] = 0
        sized.ready_ns[slots] = 0

    def _end_hold(self, key: Key) -> None:
        """What is held of a site is as any other newcomer from now on."""
        if self._holds.pop(key, None) is not None:
            sized, slots = self._classes[self._unit_bytes[key]], self._slots[key]
            here = slots[slots >= 0].astype(np.int64)
            sized.mark(here[sized.marks[here] >= HELD], 0)

    def _next_turn(self) -> None:
        self._turn += 1
        while self._holds:
            key, last_turn = next(iter(self._holds.items()))
            if last_turn >= self._turn:
                break
            self._end_hold(key)

    def _new_owner(self, key: Key) -> int:
        """A number that no key has now."""
        if None in self._keys:
            owner = self._keys.index(None)
            self._keys[owner] = key
            return owner
        self._keys.append(key)
        return len(self._keys) - 1


def _lines(size_bytes: int) -> U8:
    """Memory that starts at a multiple of LINE_BYTES, untouched."""
    memory: U8 = np.empty(size_bytes + LINE_BYTES, np.uint8)
    skipped = -memory.ctypes.data % LINE_BYTES
    return memory[skipped : skipped + size_bytes]
