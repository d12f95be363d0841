"""Dice without a state: a number for each thing and seed, the same whenever it is asked.

`mix` is the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014). A stream is the generator itself, started at a mixed key.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, vectorize
from numpy.random import PCG64, Generator

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31, _11 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(11)
_UNIT = 2.0**-53


@njit(nogil=True, cache=True)
def mix(value: Any) -> Any:
    """64 bits from 64 bits, each of which depends on all."""
    value = (value ^ (value >> _30)) * _FIRST
    value = (value ^ (value >> _27)) * _SECOND
    return value ^ (value >> _31)


@njit(nogil=True, cache=True)
def key_of(seed: Any, thing: Any, age: Any) -> Any:
    """Where the stream of a thing (a sector, a page) at an age (its erases) starts."""
    return mix(mix(np.uint64(seed) + GOLDEN * np.uint64(thing + 1)) + np.uint64(age))


@njit(nogil=True, cache=True)
def fraction(bits: Any) -> Any:
    """From 64 bits to a number above 0 and at most 1."""
    return (np.float64(bits >> _11) + 1.0) * _UNIT


@vectorize(nopython=True, cache=True)
def _throw(seed: Any, thing: Any, age: Any) -> Any:
    return fraction(key_of(seed, thing, age))


def seeded(seed: int) -> Generator:
    """A generator of its own for one fault, from the drive's seed: one seed replays one run."""
    return Generator(PCG64(seed))


def throw(seed: int, things: I64, ages: I64) -> F64:
    """A number above 0 and at most 1 for each thing [n] at its age [n]."""
    thrown: F64 = _throw(np.int64(seed), things, ages)
    return thrown
