"""Units copied and their CRC32C computed in one pass, at about the rate of memcpy.

A unit that is copied and then checked is read twice, and checked once more slowly than it could be:
a copy waits for memory and leaves the processor idle. Here each line of 64 bytes goes from the
source into a vector register, from there to one place or two, and through the CRC instruction while
it is at hand. Four units run side by side, which hides that instruction's latency.

Large copies *stream*: lines go to memory past the caches, as a large memcpy's do, which saves
reading the target first. Units whose size is no multiple of 64 are not for here.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from csd_device.config import SECTOR_BYTES
from csd_protocol.crc32c import crc_step

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

LINE_BYTES = 64
STREAM_BYTES_MIN = 8 << 20  # of a copy; smaller ones stay in the cache for who reads them next
_ONES = np.uint64(0xFFFFFFFF)
_LINE = ir.VectorType(ir.IntType(64), LINE_BYTES // 8)
_WORD = ir.IntType(64)


def _copy_line(is_streamed: bool) -> Any:
    """One line from an address to another, the latter a multiple of 64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = (builder.inttoptr(item, _LINE.as_pointer()) for item in arguments)
        stored = builder.store(builder.load(source, align=1), target, align=LINE_BYTES)
        if is_streamed:
            one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
            stored.set_metadata("nontemporal", one)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _put_line(typing_context: Any, source: Any, target: Any) -> Any:
    return _copy_line(is_streamed=False)


@intrinsic
def _stream_line(typing_context: Any, source: Any, target: Any) -> Any:
    return _copy_line(is_streamed=True)


@intrinsic
def _load_word(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], _WORD.as_pointer()), align=1)

    return types.uint64(types.int64), generate


@intrinsic
def _fence(typing_context: Any) -> Any:
    """What was streamed is seen by others before what is written from here on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@njit(nogil=True, cache=True)
def _pass_line(crc: Any, source: Any, target: Any, keep: Any, streams: Any) -> Any:
    """Copies one line to `target`, and to `keep` unless that is 0; the CRC with it.

    `streams` is None or True, so that each is compiled alone: LLVM would fold two branches that
    differ in no more than a hint.
    """
    if streams is None:
        _put_line(source, target)
        if keep:
            _put_line(source, keep)
    else:
        _stream_line(source, target)
        if keep:
            _stream_line(source, keep)
    for at in range(0, LINE_BYTES, 8):
        crc = crc_step(crc, _load_word(source + at))
    return crc


@njit(nogil=True, cache=True)
def _line_at(base: Any, start: Any, sectors: Any) -> Any:
    """The address of the line at `start`; `sectors` is None, or says which sector it lies in."""
    if sectors is None:
        return base + start
    inner = start % SECTOR_BYTES
    return base + (np.int64(sectors[start // SECTOR_BYTES]) - 1) * SECTOR_BYTES + inner


@njit(nogil=True, cache=True)
def _pass_four(
    base: Any, sectors: Any, starts: Any, targets: Any, keeps: Any, unit_bytes: Any, streams: Any
) -> Any:
    """Four units side by side; the CRC of each before the final inversion."""
    crc_a = crc_b = crc_c = crc_d = _ONES
    is_kept = keeps[0] != 0
    for at in range(0, unit_bytes, LINE_BYTES):
        kept = at if is_kept else 0
        line_a = _line_at(base, starts[0] + at, sectors)
        line_b = _line_at(base, starts[1] + at, sectors)
        line_c = _line_at(base, starts[2] + at, sectors)
        line_d = _line_at(base, starts[3] + at, sectors)
        crc_a = _pass_line(crc_a, line_a, targets[0] + at, keeps[0] + kept, streams)
        crc_b = _pass_line(crc_b, line_b, targets[1] + at, keeps[1] + kept, streams)
        crc_c = _pass_line(crc_c, line_c, targets[2] + at, keeps[2] + kept, streams)
        crc_d = _pass_line(crc_d, line_d, targets[3] + at, keeps[3] + kept, streams)
    return crc_a, crc_b, crc_c, crc_d


@njit(nogil=True, cache=True)
def _pass_one(
    base: Any, sectors: Any, start: Any, target: Any, keep: Any, unit_bytes: Any, streams: Any
) -> Any:
    crc = _ONES
    for at in range(0, unit_bytes, LINE_BYTES):
        line = _line_at(base, start + at, sectors)
        crc = _pass_line(crc, line, target + at, keep + at if keep else 0, streams)
    return crc


@njit(nogil=True, cache=True)
def _pass_each(
    base: Any,
    sectors: Any,
    starts: Any,
    targets: Any,
    keeps: Any,
    unit_bytes: Any,
    streams: Any,
    checksums: Any,
) -> None:
    kept = np.count_nonzero(keeps)
    index = 0
    while index < starts.shape[0]:
        end = kept if index < kept else starts.shape[0]
        if index + 4 <= end:
            crcs = _pass_four(
                base,
                sectors,
                starts[index : index + 4],
                targets[index : index + 4],
                keeps[index : index + 4],
                unit_bytes,
                streams,
            )
            for offset in range(4):
                checksums[index + offset] = np.uint32(crcs[offset] ^ _ONES)
            index += 4
        else:
            start, target, keep = starts[index], targets[index], keeps[index]
            crc = _pass_one(base, sectors, start, target, keep, unit_bytes, streams)
            checksums[index] = np.uint32(crc ^ _ONES)
            index += 1


@njit(nogil=True, cache=True)
def _pass_all(
    base: Any,
    sectors: Any,
    starts: Any,
    targets: Any,
    keeps: Any,
    unit_bytes: Any,
    streams: Any,
    checksums: Any,
) -> None:
    """All units, given by address; those with a place to be kept are the first ones."""
    if streams:
        _pass_each(base, sectors, starts, targets, keeps, unit_bytes, True, checksums)
        _fence()
    else:
        _pass_each(base, sectors, starts, targets, keeps, unit_bytes, None, checksums)


@dataclass(frozen=True, slots=True)
class Keep:
    """Where the first units of a copy go as well."""

    memory: U8  # flat
    starts: I64  # [at most as many as are copied]


def can_copy_checked(out: U8, keep: Keep) -> bool:
    """Whether `copy_checked` takes units of this size to these places."""
    kept_at = keep.memory.ctypes.data if keep.starts.size else 0
    return not any(number % LINE_BYTES for number in (out.shape[1], out.ctypes.data, kept_at))


def copy_checked(
    source: U8,
    starts: I64,
    out: U8,
    rows: I64,
    keep: Keep,
    sectors: U16 | None = None,
    *,
    of_bytes: int | None = None,
) -> U32:
    """Copies the unit at `source[starts[i]]` to the row out[rows[i]]; the CRC32C of each [n].

    `source` and what is kept are flat, `out` is [m, unit_bytes], all contiguous. With `sectors`,
    what `starts` name are sectors of which sectors[s] - 1 says where in `source` number s lies, and
    each start is a multiple of 64. A range outside of any is a bug and fails an assertion; which
    sectors of `source` there are is the caller's to know.
    `of_bytes`: the size of the copy that this is a part of, if it is one.
    """
    count, unit_bytes = starts.size, out.shape[1]
    assert rows.size == count
    assert rows.min(initial=0) >= 0
    assert rows.max(initial=-1) < out.shape[0]
    assert keep.starts.size <= count
    assert can_copy_checked(out, keep)
    assert out.flags.c_contiguous
    if sectors is None:
        _assert_inside(starts, unit_bytes, source)
    else:
        assert not (starts % LINE_BYTES).any()
        assert starts.max(initial=0) + unit_bytes <= sectors.size * SECTOR_BYTES
    _assert_inside(keep.starts, unit_bytes, keep.memory)
    targets = out.ctypes.data + rows * unit_bytes
    keeps = np.zeros(count, np.int64)
    keeps[: keep.starts.size] = keep.memory.ctypes.data + keep.starts
    checksums = np.empty(count, np.uint32)
    streams = (of_bytes or count * unit_bytes) >= STREAM_BYTES_MIN
    base = source.ctypes.data
    _pass_all(base, sectors, starts, targets, keeps, unit_bytes, streams, checksums)
    return checksums


def _assert_inside(starts: I64, unit_bytes: int, memory: U8) -> None:
    assert memory.ndim == 1
    assert memory.flags.c_contiguous
    if starts.size:
        assert starts.min() >= 0
        assert starts.max() + unit_bytes <= memory.size
