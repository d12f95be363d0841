"""Bit errors, the code over them, and read retry.

The clean media hand over the bytes as they were written. Each codeword (a sector of 4096 bytes) is
then *sensed*: every bit of it is flipped with the probability that `BitErrors` gives for its
superblock's wear, age and reads, independently. Where the next flipped bit lies is a geometric
random number, so a sense costs time by flipped bits and not by bits. The decoder corrects up to `t`
flipped bits of a codeword exactly. Beyond that the codeword is sensed again, at the next retry
level, with a rate that is lower by a factor; each level costs one more tR. What the last level does
not bring below `t` is lost: its bytes stay as they were sensed, and UnrecoveredRead says so.

The dice of a sense hang on the seed, the sector, its erases and the level. So a sector that is read
again fails again, and more wear, age or reads only add errors to those that are there.

Where the rate is so low that not one codeword in 10^15 would exceed `t`, codewords are not sensed
one by one: correction restores all of them, and the corrected bits are counted by their mean.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from csd_device.config import SECTOR_BYTES, DriveConfig
from csd_device.errors import UnrecoveredRead
from csd_device.fault_config import BitErrors
from csd_device.nand.faults.decorator import I64, U8, Decorator, FaultCounters, name_sectors
from csd_device.nand.faults.dice import GOLDEN, fraction, key_of, mix
from csd_device.nand.geometry import locate
from csd_device.nand.media import Media, Pieces, Retries
from csd_device.nand.superblocks import Superblocks

F64 = npt.NDArray[np.float64]

CODEWORD_BITS = SECTOR_BYTES * 8
NS_PER_DAY = 86_400 * 10**9
LOST = -1  # the level of a codeword that none brought back
_RATE_MAX = 0.5  # beyond that a bit says the opposite
_READS_UNIT = 1_000.0  # reads of a page that `disturb_rate` is stated for
_NEGLIGIBLE = 1e-15


class Model(NamedTuple):
    """Coefficients of the raw bit error rate; see `BitErrors` for the equation."""

    fixed_rate: float  # below 0: none
    cell_factor: float
    base: float
    wear: float
    wear_power: float
    retention: float
    retention_wear_power: float
    retention_power: float
    disturb: float
    disturb_wear_power: float
    disturb_power: float
    added_cycles: int
    added_ns: float
    rated_cycles: int
    rated_ns: float
    pages: int  # of one superblock


class Code(NamedTuple):
    """What the decoder corrects, and what a retry does."""

    correctable: int  # bits of a codeword
    levels: int  # retries after the first sense
    level_factor: float
    safe_rate: float  # up to here no codeword fails
    seed: int


class Wear(NamedTuple):
    """Of each superblock."""

    erases: Any  # uint32
    reads: I64
    written_ns: I64


class _Found(NamedTuple):
    """What a read came to: room for each sector of each piece."""

    psas: I64  # sectors that were retried, in the order read, perhaps more than once
    levels: I64  # of each; LOST
    sums: I64  # [4] entries above, corrected bits, corrected sectors, retries


@njit(nogil=True, cache=True)
def rate_of(model: Any, erases: Any, reads: Any, age_ns: Any) -> Any:
    """The probability that one bit reads back wrong."""
    if model.fixed_rate >= 0.0:
        return min(model.fixed_rate, _RATE_MAX)
    # A block that was never erased is in its first cycle.
    cycles = (np.float64(erases) + 1.0 + model.added_cycles) / model.rated_cycles
    age = (max(np.float64(age_ns), 0.0) + model.added_ns) / model.rated_ns
    reads_of_page = np.float64(reads) / model.pages / _READS_UNIT
    rate = model.base + model.wear * cycles**model.wear_power
    retention = cycles**model.retention_wear_power * age**model.retention_power
    disturb = cycles**model.disturb_wear_power * reads_of_page**model.disturb_power
    rate += model.retention * retention + model.disturb * disturb
    return min(model.cell_factor * rate, _RATE_MAX)


@njit(nogil=True, cache=True)
def sense(key: Any, level: Any, rate: Any, positions: Any) -> Any:
    """Fills `positions` with the bits of a codeword that read wrong, ascending; how many."""
    if rate <= 0.0:
        return 0
    state = mix(key + np.uint64(level) * GOLDEN)
    scale = 1.0 / math.log1p(-rate)
    count, at = 0, np.int64(-1)
    while True:
        state += GOLDEN
        gap = math.log(fraction(mix(state))) * scale
        if gap >= CODEWORD_BITS:
            return count
        at += 1 + np.int64(gap)
        if at >= CODEWORD_BITS:
            return count
        positions[count] = at
        count += 1


@njit(nogil=True, cache=True)
def flip(out: Any, inner: Any, positions: Any, count: Any) -> None:
    """Flips those bits of a codeword that lie in `out`, its bytes from `inner` on."""
    for index in range(count):
        byte = (positions[index] >> 3) - inner
        if 0 <= byte < out.shape[0]:
            out[byte] ^= np.uint8(1 << (positions[index] & 7))


@njit(nogil=True, cache=True)
def _decode(code: Any, key: Any, rate: Any, out: Any, inner: Any, positions: Any) -> Any:
    """The level that corrects this codeword, or LOST; and the wrong bits of its last sense."""
    count = 0
    for level in range(code.levels + 1):
        count = sense(key, level, rate, positions)
        flip(out, inner, positions, count)
        if count > code.correctable and level == code.levels:
            return LOST, count
        flip(out, inner, positions, count)  # corrected, or let go of for the next sense
        if count <= code.correctable:
            return level, count
        rate *= code.level_factor
    return LOST, count


@njit(nogil=True, cache=True)
def _note(found: Any, code: Any, psa: Any, level: Any, count: Any) -> None:
    if level != LOST:
        found.sums[1] += count
    if level == 0:
        found.sums[2] += count > 0
        return
    found.psas[found.sums[0]], found.levels[found.sums[0]] = psa, level
    found.sums[0] += 1
    found.sums[3] += code.levels if level == LOST else level


@njit(nogil=True, cache=True)
def _sense_all(
    model: Any, code: Any, wear: Any, per_superblock: Any, now_ns: Any,
    pieces: Any, out: Any, found: Any,
) -> Any:  # fmt: skip
    """Senses and decodes what the pieces touch; mean corrected bits of what needed no look."""
    positions = np.empty(CODEWORD_BITS, np.int32)
    block, rate, mean, last = np.int64(-1), 0.0, 0.0, np.int64(-1)
    for index in range(pieces[0].shape[0]):
        at, target = pieces[0][index], pieces[2][index]
        end = at + pieces[1][index]
        while at < end:
            psa = at // SECTOR_BYTES
            if psa // per_superblock != block:
                block = psa // per_superblock
                age_ns = now_ns - wear.written_ns[block]
                rate = rate_of(model, wear.erases[block], wear.reads[block], age_ns)
            inner = at - psa * SECTOR_BYTES
            length = min(SECTOR_BYTES - inner, end - at)
            if rate <= code.safe_rate:
                length = min(end, (block + 1) * per_superblock * SECTOR_BYTES) - at
                mean += rate * 8 * length
            else:
                key = key_of(code.seed, psa, wear.erases[block])
                view = out[target : target + length]
                level, count = _decode(code, key, rate, view, inner, positions)
                if psa != last:
                    _note(found, code, psa, level, count)
                last = psa
            at += length
            target += length
    return mean


class BitErrorMedia(Decorator):
    """Bytes as ECC gives them back, and how long that took."""

    def __init__(
        self,
        inner: Media,
        counters: FaultCounters,
        settings: BitErrors,
        config: DriveConfig,
        superblocks: Superblocks,
        now: Callable[[], int],
        seed: int,
    ) -> None:
        """`now`: the drive clock's ns, against which data ages."""
        super().__init__(inner, counters)
        self._model = model_of(settings, config)
        self._code = code_of(settings, seed)
        self._geometry = config.geometry
        self._read_ns = np.array(config.timing.read_ns_by_type, np.int64)
        self._superblocks, self._now = superblocks, now

    def gather(self, pieces: Pieces, out: U8) -> Retries | None:
        """Raises UnrecoveredRead; what could not be corrected is then in `out` as it was sensed."""
        before = self.inner.gather(pieces, out)
        found = self._sense(pieces, out)
        count, bits, corrected, retries = found.sums.tolist()
        self._counters.corrected_bits += bits
        self._counters.corrected_sectors += corrected
        if not count:
            return before
        psas, first = np.unique(found.psas[:count], return_index=True)
        levels = found.levels[:count][first]
        lost = psas[levels == LOST]
        self._counters.retries += retries
        self._counters.retried_sectors += psas.size - lost.size
        self._counters.uncorrectable_sectors += lost.size
        if lost.size:
            raise UnrecoveredRead(
                f"{name_sectors(lost)}: more than {self._code.correctable} wrong bits of "
                f"{CODEWORD_BITS}, also after {self._code.levels} retries",
                psas=lost,
            )
        return _joined(before, Retries(psas, levels * self._sense_ns(psas)))

    def _sense(self, pieces: Pieces, out: U8) -> _Found:
        room = int((pieces.lengths // SECTOR_BYTES + 2).sum())
        found = _Found(np.empty(room, np.int64), np.empty(room, np.int64), np.zeros(4, np.int64))
        blocks = self._superblocks
        wear = Wear(blocks.erases, blocks.reads, blocks.written_ns)
        columns = (pieces.starts, pieces.lengths, pieces.targets)
        per_superblock = self._geometry.sectors_per_superblock
        mean = _sense_all(
            self._model, self._code, wear, per_superblock, self._now(), columns, out, found
        )
        found.sums[1] += round(mean)
        return found

    def _sense_ns(self, psas: I64) -> I64:
        """tR of the page of each sector."""
        pages = locate(self._geometry, psas // self._geometry.sectors_per_page).page
        times: I64 = self._read_ns[pages % self._read_ns.size]
        return times


def model_of(settings: BitErrors, config: DriveConfig) -> Model:
    """The coefficients of this drive's cells."""
    return Model(
        fixed_rate=-1.0 if settings.rate is None else settings.rate,
        cell_factor=settings.cell_factors[config.timing.cell.bits - 1],
        base=settings.base_rate,
        wear=settings.wear_rate,
        wear_power=settings.wear_power,
        retention=settings.retention_rate,
        retention_wear_power=settings.retention_wear_power,
        retention_power=settings.retention_power,
        disturb=settings.disturb_rate,
        disturb_wear_power=settings.disturb_wear_power,
        disturb_power=settings.disturb_power,
        added_cycles=settings.added_cycles,
        added_ns=settings.added_days * NS_PER_DAY,
        rated_cycles=config.endurance.rated_cycles,
        rated_ns=float(config.endurance.retention_days * NS_PER_DAY),
        pages=config.geometry.pages_per_superblock,
    )


def code_of(settings: BitErrors, seed: int) -> Code:
    """The code over a codeword: four times what it corrects of 1 KiB."""
    correctable = settings.correctable_bits_per_kib * (SECTOR_BYTES // 1024)
    return Code(
        correctable=correctable,
        levels=settings.retry_levels,
        level_factor=settings.retry_rate_factor,
        safe_rate=safe_rate(correctable),
        seed=seed,
    )


def safe_rate(correctable: int) -> float:
    """The highest rate at which fewer than one codeword in 10^15 has more wrong bits than that.

    By Chernoff's bound on a binomial tail: P(X >= k) <= exp(-n D(k/n || p)).
    """
    share = (correctable + 1) / CODEWORD_BITS
    if share >= 1.0:
        return _RATE_MAX
    low, high = 0.0, min(share, _RATE_MAX)
    for _ in range(60):
        rate = (low + high) / 2
        if rate == 0.0:
            break
        exponent = share * math.log(share / rate)
        exponent += (1 - share) * math.log((1 - share) / (1 - rate))
        is_safe = exponent * CODEWORD_BITS > -math.log(_NEGLIGIBLE)
        low, high = (rate, high) if is_safe else (low, rate)
    return low


def _joined(before: Retries | None, mine: Retries) -> Retries:
    """Both times of a sector that both made slower."""
    if before is None:
        return mine
    psas, place = np.unique(np.concatenate([before.psas, mine.psas]), return_inverse=True)
    extra_ns = np.zeros(psas.size, np.int64)
    np.add.at(extra_ns, place, np.concatenate([before.extra_ns, mine.extra_ns]))
    return Retries(psas, extra_ns)
