"""Compiled arithmetic on packed weights: fused FFN neurons, dot products and row sums.

Decoding is bound by how fast weights come from memory, so weights are read once, as they lie on
the drive (16-bit values or levels, row after row), widened in registers and accumulated in float32.
With few activation rows (decode, up to `NARROW_ROWS`) compiled loops do all of it. With many
(prefill) the same weights serve every row and arithmetic counts, so tiles of about `TILE_BYTES`
are widened once into a scratch that stays in cache and go through torch's matrix product.

Results do not depend on the number of threads: rows are cut into lanes by their count alone, each
lane sums its chunks of `CHUNK_ROWS` rows in order, and lanes are added in order. Every kernel
releases the GIL.

Weights are uint16 arrays [count, words]; `rows` picks and orders some of them (int64, None: all
in order), so a gathered subset needs no copy. `encoding` says what a row of words holds, one word a
value or fewer. All arrays are C-contiguous; a kernel raises ValueError when shapes, types or
layouts do not fit.
"""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import config, njit, prange

from host_client.runtime.row_arithmetic import Encoding, add_scaled, dot, fetch_ahead, widen

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]
I64 = npt.NDArray[np.int64]

NARROW_ROWS = 8  # activation rows up to which the compiled loops beat widening tiles
CHUNK_ROWS = 128  # weight rows summed into one float32 accumulator, which bounds its rounding
LANES_MAX = 16
LANE_BYTES = 4 << 20  # below this a second thread costs the drive and the reader more than it gives
TILE_BYTES = 2 << 20  # float32 scratch of the wide path

config.THREADING_LAYER = "workqueue"  # OpenMP's threads spin where these sleep, and cores are few
_parallel_region = threading.Lock()  # numba's work queue takes one parallel call at a time


def neurons(
    x: F32,
    units: U16,
    rows: I64 | None,
    out: F32,
    encoding: Encoding,
    activity: F32 | None = None,
) -> None:
    """Add the output of SwiGLU neurons to `out`: sum over rows of silu(x.gate) * (x.up) * down.

    x [tokens, hidden]; units [count, 3 rows], each gate row, up row, down column;
    rows [k] into units; out [tokens, hidden] += ; activity [tokens, k], when given, receives
    |silu(x.gate) * (x.up)|.
    """
    tokens, hidden = x.shape
    weights, picked = _checked(units, rows, 3 * encoding.row_words(hidden), encoding)
    _check_floats("x", x, (tokens, hidden))
    _check_floats("out", out, (tokens, hidden))
    if activity is not None:
        _check_floats("activity", activity, (tokens, picked.shape[0]))
    if tokens > NARROW_ROWS:
        _wide_neurons(x, weights, picked, out, activity)
        return
    acts = np.empty((tokens, picked.shape[0]), np.float32) if activity is None else activity
    lanes = _lanes(picked, units)
    if lanes == 1:
        _neurons_serial(x, weights, picked, out, acts)
        return
    with _parallel_region:
        _neurons_parallel(x, weights, picked, out, acts, lanes)


def rows_dot(x: F32, weights: U16, rows: I64 | None, out: F32, encoding: Encoding) -> None:
    """out[t, i] = x[t] . weights[rows[i]]: y = x @ w.T.

    x [tokens, columns]; weights [count, words]; rows [k]; out [tokens, k], overwritten.
    """
    tokens, columns = x.shape
    bits, picked = _checked(weights, rows, encoding.row_words(columns), encoding)
    _check_floats("x", x, (tokens, columns))
    _check_floats("out", out, (tokens, picked.shape[0]))
    if tokens > NARROW_ROWS:
        _wide_dot(x, bits, picked, out)
        return
    lanes = _lanes(picked, weights)
    if lanes == 1:
        _dot_rows(x, bits, picked, out, 0, picked.shape[0])
        return
    with _parallel_region:
        _dot_parallel(x, bits, picked, out, lanes)


def rows_axpy(a: F32, weights: U16, rows: I64 | None, out: F32, encoding: Encoding) -> None:
    """out[t] += sum over i of a[t, i] * weights[rows[i]]: y += a @ w.

    a [tokens, k]; weights [count, words]; rows [k]; out [tokens, columns].
    """
    tokens, columns = out.shape
    bits, picked = _checked(weights, rows, encoding.row_words(columns), encoding)
    _check_floats("a", a, (tokens, picked.shape[0]))
    _check_floats("out", out, (tokens, columns))
    if tokens > NARROW_ROWS:
        _wide_axpy(a, bits, picked, out)
        return
    lanes = _lanes(picked, weights)
    if lanes == 1:
        _axpy_serial(a, bits, picked, out)
        return
    with _parallel_region:
        _axpy_parallel(a, bits, picked, out, lanes)


def widen_rows(weights: U16, rows: I64 | None, out: F32, encoding: Encoding) -> None:
    """out[i] = weights[rows[i]] as float32. weights [count, words]; out [k, columns]."""
    columns = out.shape[1]
    bits, picked = _checked(weights, rows, encoding.row_words(columns), encoding)
    _check_floats("out", out, (picked.shape[0], columns))
    _widen_range(bits, picked, 0, picked.shape[0], 1, out)


# ---- what a caller may pass ------------------------------------------------------------------


def _checked(weights: U16, rows: I64 | None, words: int, encoding: Encoding) -> tuple[Any, I64]:
    """The weights as compiled code takes them, and the rows to take."""
    if weights.dtype != np.uint16 or not weights.flags.c_contiguous:
        raise ValueError(f"weights must be C-contiguous uint16, not {weights.dtype}")
    if weights.ndim != 2 or weights.shape[1] != words:
        raise ValueError(f"weights must be [count, {words}], not {list(weights.shape)}")
    count = weights.shape[0]
    picked = np.arange(count) if rows is None else rows
    if picked.dtype != np.int64 or picked.ndim != 1 or not picked.flags.c_contiguous:
        raise ValueError(f"rows must be contiguous int64 [k], not {picked.dtype} {picked.shape}")
    if picked.size and (picked.min() < 0 or picked.max() >= count):
        raise ValueError(f"rows must lie in 0..{count - 1}, not {picked.min()}..{picked.max()}")
    return encoding.typed(weights), picked


def _check_floats(name: str, array: F32, shape: tuple[int, ...]) -> None:
    if array.dtype != np.float32 or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"{name} must be C-contiguous float32 {list(shape)}, "
            f"not {array.dtype} {list(array.shape)}"
        )


def _lanes(picked: I64, weights: U16) -> int:
    """How many pieces to cut the rows into: by their bytes alone, never by the machine."""
    picked_bytes: int = picked.shape[0] * weights.shape[1] * 2
    return max(1, min(LANES_MAX, picked_bytes // LANE_BYTES))


# ---- many activation rows: widen a tile, multiply it -----------------------------------------


def _tiles(count: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(16, TILE_BYTES // (4 * columns))
    for start in range(0, count, step):
        yield start, min(count, start + step)


def _wide_neurons(x: F32, weights: Any, picked: I64, out: F32, activity: F32 | None) -> None:
    hidden = x.shape[1]
    x_tensor, out_tensor = torch.from_numpy(x), torch.from_numpy(out)
    for start, stop, tile in _widened(weights, picked, 3 * hidden, rows_per_unit=3):
        gate, up, down = tile[:, :hidden], tile[:, hidden : 2 * hidden], tile[:, 2 * hidden :]
        acts = torch.nn.functional.silu(x_tensor @ gate.T).mul_(x_tensor @ up.T)
        out_tensor.addmm_(acts, down)
        if activity is not None:
            torch.abs(acts, out=acts)
            activity[:, start:stop] = acts.numpy()


def _wide_dot(x: F32, weights: Any, picked: I64, out: F32) -> None:
    x_tensor, out_tensor = torch.from_numpy(x), torch.from_numpy(out)
    for start, stop, tile in _widened(weights, picked, x.shape[1]):
        out_tensor[:, start:stop] = x_tensor @ tile.T


def _wide_axpy(a: F32, weights: Any, picked: I64, out: F32) -> None:
    a_tensor, out_tensor = torch.from_numpy(a), torch.from_numpy(out)
    for start, stop, tile in _widened(weights, picked, out.shape[1]):
        out_tensor.addmm_(a_tensor[:, start:stop], tile)


def _widened(
    weights: Any, picked: I64, columns: int, rows_per_unit: int = 1
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Tiles of the picked units in float32: (start, stop, [stop - start, columns]).

    One scratch serves all tiles, so a tile is good until the next is asked for.
    """
    scratch: F32 | None = None
    for start, stop in _tiles(picked.shape[0], columns):
        if scratch is None:
            scratch = np.empty((stop - start, columns), np.float32)
        _widen_range(weights, picked, start, stop, rows_per_unit, scratch)
        yield start, stop, torch.from_numpy(scratch[: stop - start])


# ---- compiled loops --------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def _widen_range(
    weights: Any, picked: Any, start: Any, stop: Any, rows_per_unit: Any, out: Any
) -> None:
    words, columns = weights.shape[1] // rows_per_unit, out.shape[1] // rows_per_unit
    for position in range(start, stop):
        unit, into = weights[picked[position]], out[position - start]
        for row in range(rows_per_unit):
            widen(unit[row * words : (row + 1) * words], into[row * columns : (row + 1) * columns])


@njit(nogil=True, cache=True)
def _flush(chunk: Any, total: Any) -> None:
    """total += chunk; chunk = 0. Both [tokens, columns]."""
    for token in range(chunk.shape[0]):
        for column in range(chunk.shape[1]):
            total[token, column] += chunk[token, column]
            chunk[token, column] = np.float32(0)


@njit(nogil=True, cache=True)
def _neurons_range(
    x: Any, units: Any, picked: Any, start: Any, stop: Any, total: Any, activity: Any
) -> None:
    tokens, hidden = x.shape
    width = units.shape[1] // 3
    chunk = np.zeros((tokens, hidden), np.float32)
    for position in range(start, stop):
        row = units[picked[position]]
        ahead = units[picked[min(position + 1, stop - 1)]]
        for token in range(tokens):
            is_first = token == 0
            if is_first:  # a part at a time, or the processor waits for so much at once
                fetch_ahead(ahead[:width])
            gate = dot(x[token], row[:width])
            if is_first:
                fetch_ahead(ahead[width : 2 * width])
            up = dot(x[token], row[width : 2 * width])
            act = gate / (np.float32(1) + np.exp(-gate)) * up  # silu(gate) * up
            activity[token, position] = abs(act)
            if is_first:
                fetch_ahead(ahead[2 * width :])
            add_scaled(chunk[token], act, row[2 * width :])
        if (position - start + 1) % CHUNK_ROWS == 0:
            _flush(chunk, total)
    _flush(chunk, total)


@njit(nogil=True, cache=True)
def _neurons_serial(x: Any, units: Any, picked: Any, out: Any, activity: Any) -> None:
    _neurons_range(x, units, picked, 0, picked.shape[0], out, activity)


@njit(nogil=True, cache=True, parallel=True)
def _neurons_parallel(x: Any, units: Any, picked: Any, out: Any, activity: Any, lanes: Any) -> None:
    count = picked.shape[0]
    totals = np.zeros((lanes, x.shape[0], x.shape[1]), np.float32)
    for lane in prange(lanes):
        start, stop = lane * count // lanes, (lane + 1) * count // lanes
        _neurons_range(x, units, picked, start, stop, totals[lane], activity)
    for lane in range(lanes):
        _flush(totals[lane], out)


@njit(nogil=True, cache=True)
def _dot_rows(x: Any, weights: Any, picked: Any, out: Any, start: Any, stop: Any) -> None:
    for position in range(start, stop):
        row = weights[picked[position]]
        fetch_ahead(weights[picked[min(position + 1, stop - 1)]])
        for token in range(x.shape[0]):
            out[token, position] = dot(x[token], row)


@njit(nogil=True, cache=True, parallel=True)
def _dot_parallel(x: Any, weights: Any, picked: Any, out: Any, lanes: Any) -> None:
    count = picked.shape[0]
    for lane in prange(lanes):
        start, stop = lane * count // lanes, (lane + 1) * count // lanes
        _dot_rows(x, weights, picked, out, start, stop)


@njit(nogil=True, cache=True)
def _axpy_range(a: Any, weights: Any, picked: Any, start: Any, stop: Any, total: Any) -> None:
    tokens, columns = total.shape
    chunk = np.zeros((tokens, columns), np.float32)
    for position in range(start, stop):
        row = weights[picked[position]]
        fetch_ahead(weights[picked[min(position + 1, stop - 1)]])
        for token in range(tokens):
            add_scaled(chunk[token], a[token, position], row)
        if (position - start + 1) % CHUNK_ROWS == 0:
            _flush(chunk, total)
    _flush(chunk, total)


@njit(nogil=True, cache=True)
def _axpy_serial(a: Any, weights: Any, picked: Any, out: Any) -> None:
    _axpy_range(a, weights, picked, 0, picked.shape[0], out)


@njit(nogil=True, cache=True, parallel=True)
def _axpy_parallel(a: Any, weights: Any, picked: Any, out: Any, lanes: Any) -> None:
    count = picked.shape[0]
    totals = np.zeros((lanes, out.shape[0], out.shape[1]), np.float32)
    for lane in prange(lanes):
        start, stop = lane * count // lanes, (lane + 1) * count // lanes
        _axpy_range(a, weights, picked, start, stop, totals[lane])
    for lane in range(lanes):
        _flush(totals[lane], out)
