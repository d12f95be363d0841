"""Causal attention of a program, and the keys and values that it keeps of one host.

Positions are tokens of the host's text. A position's place is position modulo `context`, so it is
kept until one `context` further on takes its place; older ones are forgotten. The memory follows
from the commands alone: `begin` says what a command's position means for what is kept.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from csd_device.compute.half_rows import REORDER
from csd_device.compute.numbers import number, whole_number
from csd_device.compute.tensor_file import TensorFile, invalid
from csd_device.errors import CommandError
from csd_protocol.program_file import CONTEXT_MAX, Key
from csd_protocol.status import Status

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

_HEADS_MAX, _HEAD_DIM_MAX, _THETA_MAX = 1024, 1024, 1e12
_POSITION_BYTES = 8
_NONE = -1
POSITION_MAX = 1 << 40


@dataclass(frozen=True, slots=True)
class Attention:
    """What is the same in all of a program's attention layers."""

    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    context: int

    @classmethod
    def of(cls, file: TensorFile) -> "Attention":
        """Raises CommandError (Invalid Program Data) naming the metadata at fault."""
        shape = cls(
            heads=whole_number(file, Key.HEADS, 1, _HEADS_MAX),
            kv_heads=whole_number(file, Key.KV_HEADS, 1, _HEADS_MAX),
            head_dim=whole_number(file, Key.HEAD_DIM, 2, _HEAD_DIM_MAX),
            rope_theta=number(file, Key.ROPE_THETA, 1.0, _THETA_MAX),
            context=whole_number(file, Key.CONTEXT, 1, CONTEXT_MAX),
        )
        if shape.heads % shape.kv_heads or shape.head_dim % 2:
            raise invalid(
                f"{shape.heads} heads do not share {shape.kv_heads} of keys and values, or the "
                f"{shape.head_dim} values of a head have no halves"
            )
        return shape

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def memory_bytes(self, layers: int) -> int:
        """On-drive DRAM of the keys, values and positions of so many layers."""
        return layers * self.context * (2 * 4 * self.kv_width + _POSITION_BYTES)

    def rotated(self, vectors: F32, first: int) -> F32:
        """Rotary embedding of vectors [rows, heads * head_dim] from position `first` on."""
        half = self.head_dim // 2
        frequencies = self.rope_theta ** (-np.arange(half) / half)
        angles = (first + np.arange(vectors.shape[0]))[:, None, None] * frequencies
        cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        low, high = np.split(vectors.reshape(vectors.shape[0], -1, self.head_dim), 2, axis=2)
        turned = np.concatenate([low * cosines - high * sines, high * cosines + low * sines], 2)
        return turned.reshape(vectors.shape)

    def kept_bytes(self, first: int, rows: int) -> int:
        """Of keys and values that the last row's attention reads, at the most."""
        return min(first + rows, self.context) * 2 * 4 * self.kv_width

    def ops(self, first: int, rows: int) -> int:
        """Multiplications and additions of products with keys and values, at the most."""
        return 4 * self.query_width * min(first + rows, self.context) * rows


class KeyValues:
    """What one program keeps of one host."""

    def __init__(self, shape: Attention, layers: int) -> None:
        self._shape = shape
        self._positions: I64 = np.full((layers, shape.context), _NONE, np.int64)
        self._keys: F32 = np.zeros((layers, shape.context, shape.kv_width), np.float32)
        self._values: F32 = np.zeros((layers, shape.context, shape.kv_width), np.float32)
        self._last = (0, 0)  # position and rows of the last command

    @property
    def context(self) -> int:
        """Positions kept."""
        return self._shape.context

    def begin(self, first: int, rows: int) -> None:
        """A command that attends at these positions; forgets what a new beginning makes untrue.

        Raises CommandError (Invalid Field) for more rows than positions are kept.
        """
        if rows > self._shape.context:
            raise CommandError(
                Status.INVALID_FIELD,
                f"{rows} rows; the program keeps {self._shape.context} positions",
            )
        _check_position(first)
        last_first, last_rows = self._last
        if (first, rows) != self._last and first != last_first + last_rows:
            self._positions[self._positions >= first] = _NONE
        self._last = (first, rows)

    def keep(self, layer: int, first: int, keys: F32, values: F32) -> None:
        """Keeps keys and values [rows, kv_width], not rotated yet, from position `first` on.

        What the layer had there and behind is forgotten, of other layers nothing. Of more rows than
        positions are kept, the last ones stay. Raises CommandError (Invalid Field).
        """
        _check_position(first)
        self._positions[layer, self._positions[layer] >= first] = _NONE
        early = max(0, keys.shape[0] - self._shape.context)
        self._store(layer, first + early, keys[early:], values[early:])
        self._last = (first, keys.shape[0])

    def attend(self, layer: int, first: int, queries: F32, keys: F32, values: F32) -> F32:
        """Keeps keys and values [rows, kv_width] from position `first` on; then attends.

        queries [rows, query_width], keys and queries not rotated yet; returns [rows, query_width].
        """
        shape = self._shape
        self._store(layer, first, keys, values)
        attended = np.zeros(queries.shape, np.float32)
        _attend(
            shape.rotated(queries, first),
            self._keys[layer],
            self._values[layer],
            self._positions[layer],
            np.int64(first),
            np.int64(shape.head_dim),
            attended,
        )
        return attended

    def _store(self, layer: int, first: int, keys: F32, values: F32) -> None:
        positions = first + np.arange(keys.shape[0])
        slots = positions % self._shape.context
        self._positions[layer, slots] = positions
        self._keys[layer, slots] = self._shape.rotated(keys, first)
        self._values[layer, slots] = values


def _check_position(first: int) -> None:
    if first > POSITION_MAX:
        raise CommandError(
            Status.INVALID_FIELD, f"position {first}; programs keep positions up to {POSITION_MAX}"
        )


@njit(nogil=True, cache=True, fastmath=REORDER)
def _attend(
    queries: Any, keys: Any, values: Any, positions: Any, first: Any, head_dim: Any, attended: Any
) -> None:
    """Softmax of queries . keys / sqrt(head_dim) over kept positions up to the query's own."""
    context, heads = positions.size, queries.shape[1] // head_dim
    shared = heads // (keys.shape[1] // head_dim)
    slots = np.empty(context, np.int64)
    weights = np.empty(context, np.float32)
    for row in range(queries.shape[0]):
        count = 0
        for position in range(max(0, first + row - context + 1), first + row + 1):
            if positions[position % context] == position:
                slots[count] = position % context
                count += 1
        for head in range(heads):
            query = queries[row, head * head_dim : (head + 1) * head_dim]
            start = head // shared * head_dim
            highest = np.float32(-np.inf)
            for index in range(count):
                key = keys[slots[index], start : start + head_dim]
                product = np.float32(0)
                for value in range(head_dim):
                    product += query[value] * key[value]
                weights[index] = product / np.float32(np.sqrt(head_dim))
                highest = max(highest, weights[index])
            total = np.float32(0)
            for index in range(count):
                weights[index] = np.exp(weights[index] - highest)
                total += weights[index]
            out = attended[row, head * head_dim : (head + 1) * head_dim]
            for index in range(count):
                share = weights[index] / total
                for value in range(head_dim):
                    out[value] += share * values[slots[index], start + value]
