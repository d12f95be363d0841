"""CRC32C (Castagnoli): of one buffer, and of many equal units at once.

One buffer goes through google-crc32c. Many units go through a compiled loop that uses the
processor's own CRC instruction, four units side by side to hide its latency; where the processor
has none, a table of 8 x 256 entries does the same.
"""

from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from llvmlite import binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

_POLYNOMIAL_REFLECTED = 0x82F63B78


def crc32c(data: bytes | bytearray | memoryview | npt.NDArray[Any]) -> int:
    """CRC32C of one contiguous buffer."""
    return int(google_crc32c.value(bytes(data)))


def crc32c_units(units: U8) -> U32:
    """CRC32C of each row of `units` [count, unit_bytes], C-contiguous. Releases the GIL.

    Raises ValueError for any other shape or layout.
    """
    if units.ndim != 2 or not units.flags.c_contiguous:
        raise ValueError(f"units must be C-contiguous [count, unit_bytes], not {units.shape}")
    checksums = np.empty(units.shape[0], np.uint32)
    _crc_rows(units, checksums)
    return checksums


def _make_table() -> U32:
    table = np.zeros((8, 256), np.uint32)
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (_POLYNOMIAL_REFLECTED if crc & 1 else 0)
        table[0, byte] = crc
    for row in range(1, 8):
        table[row] = (table[row - 1] >> np.uint32(8)) ^ table[0][table[row - 1] & np.uint32(0xFF)]
    return table


_TABLE = _make_table()


def _instruction_name() -> str | None:
    """The LLVM intrinsic for eight bytes of CRC32C on this processor, if it has one."""
    features = llvm.get_host_cpu_features()
    triple = llvm.get_default_triple()
    if triple.startswith("x86_64") and features.get("sse4.2"):
        return "llvm.x86.sse42.crc32.64.64"
    if triple.startswith("aarch64") and features.get("crc"):
        return "llvm.aarch64.crc32cx"
    return None


def _hardware_step(name: str) -> Callable[..., Any]:
    """A compiled function (crc, eight bytes) -> crc made of one instruction."""
    crc_bits = 64 if "x86" in name else 32

    @intrinsic
    def step(typing_context: Any, crc: Any, word: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            crc_type, word_type = ir.IntType(crc_bits), ir.IntType(64)
            crc_value, word_value = arguments
            if crc_bits == 32:
                crc_value = builder.trunc(crc_value, crc_type)
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(crc_type, [crc_type, word_type]), name
            )
            result = builder.call(function, [crc_value, word_value])
            return builder.zext(result, word_type) if crc_bits == 32 else result

        return types.uint64(types.uint64, types.uint64), generate

    return step  # type: ignore[no-any-return]


@njit(inline="always", cache=True)
def _table_step(crc: Any, word: Any) -> Any:
    mixed = np.uint64(crc) ^ np.uint64(word)
    result = np.uint32(0)
    for byte in range(8):
        index = (mixed >> np.uint64(8 * byte)) & np.uint64(0xFF)
        result ^= _TABLE[7 - byte, index]
    return np.uint64(result)


_name = _instruction_name()
crc_step: Callable[..., Any] = _hardware_step(_name) if _name else _table_step


@njit(nogil=True, cache=True)
def _finish(crc: Any, row: Any, start: Any) -> Any:
    """The bytes behind the last whole word, and the final inversion."""
    for position in range(start, row.shape[0]):
        index = (np.uint32(crc) ^ np.uint32(row[position])) & np.uint32(0xFF)
        crc = np.uint64((np.uint32(crc) >> np.uint32(8)) ^ _TABLE[0, index])
    return np.uint32(crc) ^ np.uint32(0xFFFFFFFF)


@njit(nogil=True, cache=True)
def _crc_rows(units: Any, checksums: Any) -> None:
    count, unit_bytes = units.shape
    words = unit_bytes // 8
    ones = np.uint64(0xFFFFFFFF)
    first = 0
    while first + 4 <= count:
        row_a = units[first, : words * 8].view(np.uint64)
        row_b = units[first + 1, : words * 8].view(np.uint64)
        row_c = units[first + 2, : words * 8].view(np.uint64)
        row_d = units[first + 3, : words * 8].view(np.uint64)
        crc_a = crc_b = crc_c = crc_d = ones
        for word in range(words):
            crc_a = crc_step(crc_a, row_a[word])
            crc_b = crc_step(crc_b, row_b[word])
            crc_c = crc_step(crc_c, row_c[word])
            crc_d = crc_step(crc_d, row_d[word])
        checksums[first] = _finish(crc_a, units[first], words * 8)
        checksums[first + 1] = _finish(crc_b, units[first + 1], words * 8)
        checksums[first + 2] = _finish(crc_c, units[first + 2], words * 8)
        checksums[first + 3] = _finish(crc_d, units[first + 3], words * 8)
        first += 4
    for row in range(first, count):
        crc = ones
        words_of_row = units[row, : words * 8].view(np.uint64)
        for word in range(words):
            crc = crc_step(crc, words_of_row[word])
        checksums[row] = _finish(crc, units[row], words * 8)
