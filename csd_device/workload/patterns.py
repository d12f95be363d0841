"""Jobs, and the requests that they come to: arrays of first blocks and of which are reads.

Requests are aligned to their own size within the job's region. Random ones are drawn with
replacement, each place as likely or by Zipf's law; sequential ones go through the region again and
again, reads and writes each on their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from math import gcd

import numpy as np
import numpy.typing as npt

from csd_device.config import SECTOR_BYTES
from csd_protocol.units import format_size

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Dice = Callable[[int], np.random.Generator]  # a generator of this seed

_ZETA_TERMS = 1 << 20  # summed one by one; the rest is an integral
_GOLDEN = 0.6180339887498949  # where a rank goes: far from its neighbours


class WorkloadRefused(ValueError):
    """A job, job file or trace that cannot be run: what was wrong, and where."""


class Pattern(StrEnum):
    RANDREAD = "randread"
    RANDWRITE = "randwrite"
    SEQREAD = "seqread"
    SEQWRITE = "seqwrite"
    MIXED = "mixed"  # random


@dataclass(frozen=True, slots=True)
class Job:
    """One closed loop. It ends after `requests` or `duration_ns`, whichever comes first."""

    name: str
    read_share: float  # 1.0: reads only
    is_random: bool
    size_bytes: int  # of each request; whole blocks, at most MDTS
    depth: int  # requests under way
    offset_bytes: int = 0
    length_bytes: int = 0  # of the region; 0: to the end of the namespace
    requests: int | None = None
    duration_ns: int | None = None
    zipf_theta: float | None = None  # None: uniform
    seed: int = 1

    def check(self, capacity_bytes: int, mdts_bytes: int) -> None:
        """Raises WorkloadRefused for what this drive cannot do."""
        for name in ("size_bytes", "offset_bytes", "length_bytes"):
            if getattr(self, name) % SECTOR_BYTES:
                self._refuse(f"{name} {getattr(self, name)} is no multiple of {SECTOR_BYTES}")
        if not 0 < self.size_bytes <= mdts_bytes:
            self._refuse(
                f"requests of {format_size(self.size_bytes)}; the drive takes at most "
                f"{format_size(mdts_bytes)} in one command"
            )
        if self.depth < 1 or not 0 <= self.read_share <= 1:
            self._refuse(f"depth {self.depth}, share of reads {self.read_share}")
        if self.requests is None and self.duration_ns is None:
            self._refuse("neither a number of requests nor a time says when it ends")
        if self.zipf_theta is not None and (self.zipf_theta <= 0 or self.zipf_theta == 1):
            self._refuse(f"zipf:{self.zipf_theta}; theta is above 0 and not 1")
        end = self.offset_bytes + self.length_bytes
        if end > capacity_bytes or self.places(capacity_bytes) < 1:
            self._refuse(
                f"its region, {format_size(self.length_bytes)} from {self.offset_bytes}, does not "
                f"fit a namespace of {format_size(capacity_bytes)} or holds no request"
            )

    def places(self, capacity_bytes: int) -> int:
        """Places of a request within the region."""
        length = self.length_bytes or capacity_bytes - self.offset_bytes
        return length // self.size_bytes

    def _refuse(self, reason: str) -> None:
        raise WorkloadRefused(f"job {self.name}: {reason}")


class Requests:
    """The requests of one job, as many as asked for."""

    def __init__(self, job: Job, capacity_bytes: int, dice: Dice) -> None:
        self._job = job
        self._places = job.places(capacity_bytes)
        self._dice = dice(job.seed)
        self._zipf = Zipf(self._places, job.zipf_theta) if job.zipf_theta else None
        self._taken = [0, 0]  # writes, reads: of sequential ones

    def take(self, count: int) -> tuple[I64, Mask]:
        """First block [count] of the next requests, and which are reads [count]."""
        share = self._job.read_share
        reads = np.full(count, share == 1)
        if 0 < share < 1:
            reads = self._dice.random(count) < share
        places = self._random(count) if self._job.is_random else self._sequential(reads)
        slbas = (self._job.offset_bytes + places * self._job.size_bytes) // SECTOR_BYTES
        return slbas, reads

    def _random(self, count: int) -> I64:
        if self._zipf:
            return self._zipf.places(self._dice.random(count))
        return self._dice.integers(0, self._places, count)

    def _sequential(self, reads: Mask) -> I64:
        places = np.empty(reads.size, np.int64)
        for kind in (False, True):
            mine = np.flatnonzero(reads == kind)
            places[mine] = (self._taken[kind] + np.arange(mine.size)) % self._places
            self._taken[kind] += mine.size
        return places


class Zipf:
    """Zipf's law over places, ranks scattered: Gray et al., Quickly Generating Billion-Record
    Synthetic Databases (SIGMOD 1994), as fio and YCSB do it."""

    def __init__(self, places: int, theta: float) -> None:
        self._places, self._theta = places, theta
        self._zeta = _zeta(places, theta)
        first_two = 1 + 0.5**theta
        self._alpha = 1 / (1 - theta)
        rest = 1 - first_two / self._zeta if places > 2 else 1.0
        self._eta = (1 - (2 / places) ** (1 - theta)) / rest
        self._step = _coprime(int(places * _GOLDEN) or 1, places)

    def places(self, uniform: F64) -> I64:
        """A place for each number within [0, 1)."""
        scaled = uniform * self._zeta
        tail = self._places * (self._eta * uniform - self._eta + 1) ** self._alpha
        ranks = np.where(scaled < 1, 0, np.where(scaled < 1 + 0.5**self._theta, 1, tail))
        ranks = np.clip(ranks.astype(np.int64), 0, self._places - 1)
        scattered: I64 = ranks * self._step % self._places
        return scattered


def _zeta(places: int, theta: float) -> float:
    """The sum of 1 / k ** theta for k from 1 to `places`."""
    near = min(places, _ZETA_TERMS)
    total = float((np.arange(1, near + 1, dtype=np.float64) ** -theta).sum())
    if places > near:
        power = 1 - theta
        total += ((places + 0.5) ** power - (near + 0.5) ** power) / power
    return total


def _coprime(number: int, places: int) -> int:
    """The next number that shares no factor with `places`: its multiples visit each place once."""
    while gcd(number, places) != 1:
        number += 1
    return number
