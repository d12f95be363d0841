"""What kernels do with one row of weights, whatever it is encoded in: products, sums, widening.

An `Encoding` is carried into compiled code by the type of the array that holds the rows, so the
loops of `kernels` are written once and compiled for each. Rows of levels (`low_bit_units`) and of
12 bits (`lossless_units`) are decoded group by group in registers: the intrinsics below say each
vector instruction, as loops over groups of 32 half bytes are more than compilers make vectors of by
themselves. Everything is summed in float32, and values are what their levels or codes stand for:
nothing is rounded on the way.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np.numpy_support import from_dtype

from csd_protocol.lossless_units import PATCH_BYTES
from csd_protocol.low_bit_units import GROUP
from csd_protocol.packed import Bits, Site, row_bytes

U16 = npt.NDArray[np.uint16]

CACHE_LINE_BYTES = 64
FAST = {"reassoc", "contract", "nsz", "arcp"}  # vectorise sums, but keep NaN and infinity


class Encoding(Enum):
    """How the bytes of a row stand for values; the value is what compiled code sees them as."""

    HALF = np.dtype(np.uint16)
    BFLOAT16 = np.dtype(np.int16)
    LOSSLESS_12 = np.dtype([("word", np.uint16)])
    LEVELS_8 = np.dtype(np.int8)
    LEVELS_4 = np.dtype(np.uint8)

    @classmethod
    def of(cls, site: Site, dtype: Literal["float16", "bfloat16"]) -> "Encoding":
        """Of a site's rows; dtype: of the model's 16-bit values."""
        if site.bits == 16:
            return cls.BFLOAT16 if dtype == "bfloat16" else cls.HALF
        return next(encoding for encoding, bits in _BITS.items() if bits == site.bits)

    def row_words(self, columns: int) -> int:
        """16-bit words of a row of so many values."""
        return row_bytes(columns, _BITS.get(self, 16)) // 2

    def typed(self, rows: U16) -> Any:
        """Rows [count, words] as compiled code takes them."""
        return rows.view(self.value)


_BITS: dict[Encoding, Bits] = {
    Encoding.LOSSLESS_12: 12,
    Encoding.LEVELS_8: 8,
    Encoding.LEVELS_4: 4,
}

# ---- one row -----------------------------------------------------------------------------------


def dot(x: Any, row: Any) -> Any:
    """x . row, float32."""
    raise NotImplementedError("compiled only")


def add_scaled(total: Any, scale: Any, row: Any) -> None:
    """total += scale * row."""
    raise NotImplementedError("compiled only")


def widen(row: Any, out: Any) -> None:
    """out = row as float32."""
    raise NotImplementedError("compiled only")


@njit(nogil=True, cache=True)
def fetch_ahead(row: Any) -> None:
    """Has the processor bring a row, or a part of one, into its cache: it is read soon.

    It foresees no more than a page of 4 KiB by itself.
    """
    address = row.ctypes.data
    for at in range(0, row.shape[0] * row.itemsize, CACHE_LINE_BYTES):
        _prefetch(address + at)


def _holds_levels(row: Any) -> bool:
    return row.dtype in _LEVEL_BITS


def _holds_codes(row: Any) -> bool:
    return bool(row.dtype == _CODED)


@overload(dot, jit_options={"fastmath": FAST})
def _dot(x: Any, row: Any) -> Callable[[Any, Any], Any]:
    if _holds_levels(row):

        def of_levels(x: Any, row: Any) -> Any:
            return _dot_levels(x, row)

        return of_levels

    if _holds_codes(row):

        def of_codes(x: Any, row: Any) -> Any:
            return _dot_codes(x, row)

        return of_codes

    def of_16_bits(x: Any, row: Any) -> Any:
        total = np.float32(0)
        for column in range(x.shape[0]):
            total += _widen_16(row[column]) * x[column]
        return total

    return of_16_bits


@overload(add_scaled, jit_options={"fastmath": FAST})
def _add_scaled(total: Any, scale: Any, row: Any) -> Callable[[Any, Any, Any], None]:
    if _holds_levels(row):

        def of_levels(total: Any, scale: Any, row: Any) -> None:
            _add_levels(total, scale, row)

        return of_levels

    if _holds_codes(row):

        def of_codes(total: Any, scale: Any, row: Any) -> None:
            _add_codes(total, scale, row)

        return of_codes

    def of_16_bits(total: Any, scale: Any, row: Any) -> None:
        for column in range(total.shape[0]):
            total[column] += scale * _widen_16(row[column])

    return of_16_bits


@overload(widen)
def _widen(row: Any, out: Any) -> Callable[[Any, Any], None]:
    if _holds_levels(row):

        def of_levels(row: Any, out: Any) -> None:
            out[:] = np.float32(0)
            _add_levels(out, np.float32(1), row)

        return of_levels

    if _holds_codes(row):

        def of_codes(row: Any, out: Any) -> None:
            _widen_codes(row, out)

        return of_codes

    def of_16_bits(row: Any, out: Any) -> None:
        for column in range(row.shape[0]):
            out[column] = _widen_16(row[column])

    return of_16_bits


@intrinsic
def _widen_16(typing_context: Any, bits: Any) -> Any:
    """16 bits to float32: int16 holds a bfloat16, uint16 an IEEE half."""
    is_bfloat = bits == types.int16

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if is_bfloat:
            word = builder.zext(arguments[0], ir.IntType(32))
            shifted = builder.shl(word, ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(shifted, ir.FloatType())
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(bits), generate


@intrinsic
def _prefetch(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _BYTE.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _INT, _INT, _INT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, _INT(0), _INT(2), _INT(1)])  # read; into L2; data
        return context.get_dummy_value()

    return types.void(types.intp), generate


# ---- levels ------------------------------------------------------------------------------------

_LANES = GROUP // 2  # a group is two vectors of these
_BYTE, _WORD = ir.IntType(8), ir.IntType(16)
_INT, _INDEX = ir.IntType(32), ir.IntType(64)
_FLOAT = ir.FloatType()
_BYTES, _INTS = ir.VectorType(_BYTE, _LANES), ir.VectorType(_INT, _LANES)
_FLOATS = ir.VectorType(_FLOAT, _LANES)
_FLAGS = ("reassoc", "contract", "nsz", "arcp")


_LEVEL_BITS = {types.int8: 8, types.uint8: 4}


class _Row:
    """Instructions that read one low-bit row of `columns` values."""

    def __init__(self, builder: Any, row: Any, columns: Any, bits: int) -> None:
        self._builder, self._bits = builder, bits
        self._group_bytes = GROUP * bits // 8
        self._bytes = builder.bitcast(row, _BYTE.as_pointer())
        self.groups = builder.udiv(columns, _INDEX(GROUP))
        self._scales = builder.mul(self.groups, _INDEX(self._group_bytes))
        self._minima = builder.add(self._scales, builder.mul(self.groups, _INDEX(2)))

    def scale(self, group: Any) -> Any:
        return self._number(self._scales, group)

    def minimum(self, group: Any) -> Any:
        """None: 8-bit levels have none."""
        return self._number(self._minima, group) if self._bits == 4 else None

    def halves(self, group: Any) -> tuple[Any, Any]:
        """The levels of a group as two vectors of floats."""
        builder = self._builder
        at = builder.mul(group, _INDEX(self._group_bytes))
        first = _load(builder, self._bytes, at, _BYTES)
        if self._bits == 8:
            second = _load(builder, self._bytes, builder.add(at, _INDEX(_LANES)), _BYTES)
            low, high = builder.sext(first, _INTS), builder.sext(second, _INTS)
        else:
            both = builder.zext(first, _INTS)
            low = builder.and_(both, _INTS([15] * _LANES))
            high = builder.lshr(both, _INTS([4] * _LANES))
        return builder.sitofp(low, _FLOATS), builder.sitofp(high, _FLOATS)

    def _number(self, start: Any, group: Any) -> Any:
        """A group's float16, widened."""
        at = self._builder.add(start, self._builder.mul(group, _INDEX(2)))
        return self._builder.fpext(_load(self._builder, self._bytes, at, ir.HalfType()), _FLOAT)


def _load(builder: Any, base: Any, offset: Any, kind: Any) -> Any:
    """What lies `offset` items behind `base`, aligned or not."""
    pointer = builder.bitcast(builder.gep(base, [offset]), kind.as_pointer())
    return builder.load(pointer, align=1)


def _store(builder: Any, base: Any, offset: Any, value: Any) -> None:
    """Puts a value `offset` items behind `base`, aligned or not."""
    pointer = builder.bitcast(builder.gep(base, [offset]), value.type.as_pointer())
    builder.store(value, pointer, align=1)


def _spread(builder: Any, value: Any) -> Any:
    """The same float in all lanes."""
    undefined = _FLOATS(ir.Undefined)
    single = builder.insert_element(undefined, value, _INT(0))
    return builder.shuffle_vector(single, undefined, _INTS([0] * _LANES))


def _sum_lanes(builder: Any, values: Any) -> Any:
    kind = ir.FunctionType(_FLOAT, [_FLOAT, _FLOATS])
    name = f"llvm.vector.reduce.fadd.v{_LANES}f32"
    together = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(together, [_FLOAT(0.0), values], fastmath=_FLAGS)


def _floats_of(context: Any, builder: Any, kind: Any, array: Any) -> tuple[Any, Any]:
    """Pointer and length of a float32 vector."""
    made = context.make_array(kind)(context, builder, array)
    return made.data, cgutils.unpack_tuple(builder, made.shape, 1)[0]


def _row_of(context: Any, builder: Any, kind: Any, array: Any, columns: Any) -> _Row:
    data = context.make_array(kind)(context, builder, array).data
    return _Row(builder, data, columns, _LEVEL_BITS[kind.dtype])


@intrinsic
def _dot_levels(typing_context: Any, x: Any, row: Any) -> Any:
    """x . row: each group's products times its scale, and its inputs times its minimum."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        inputs, columns = _floats_of(context, builder, x, arguments[0])
        levels = _row_of(context, builder, row, arguments[1], columns)
        sums = cgutils.alloca_once_value(builder, _FLOATS([0.0] * _LANES))
        with cgutils.for_range(builder, levels.groups) as loop:
            at = builder.mul(loop.index, _INDEX(GROUP))
            low, high = levels.halves(loop.index)
            first = _load(builder, inputs, at, _FLOATS)
            second = _load(builder, inputs, builder.add(at, _INDEX(_LANES)), _FLOATS)
            products = builder.fmul(low, first, _FLAGS)
            products = builder.fadd(products, builder.fmul(high, second, _FLAGS), _FLAGS)
            scale, minimum = levels.scale(loop.index), levels.minimum(loop.index)
            added = builder.fmul(products, _spread(builder, scale), _FLAGS)
            if minimum is not None:
                both = builder.fadd(first, second, _FLAGS)
                shift = builder.fmul(both, _spread(builder, minimum), _FLAGS)
                added = builder.fadd(added, shift, _FLAGS)
            builder.store(builder.fadd(builder.load(sums), added, _FLAGS), sums)
        return _sum_lanes(builder, builder.load(sums))

    return types.float32(x, row), generate


@intrinsic
def _add_levels(typing_context: Any, total: Any, scale: Any, row: Any) -> Any:
    """total += scale * row."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, columns = _floats_of(context, builder, total, arguments[0])
        levels = _row_of(context, builder, row, arguments[2], columns)
        with cgutils.for_range(builder, levels.groups) as loop:
            factor = builder.fmul(arguments[1], levels.scale(loop.index), _FLAGS)
            minimum = levels.minimum(loop.index)
            for half, values in enumerate(levels.halves(loop.index)):
                start = builder.mul(loop.index, _INDEX(GROUP))
                at = builder.add(start, _INDEX(half * _LANES))
                summed = _load(builder, sums, at, _FLOATS)
                added = builder.fmul(values, _spread(builder, factor), _FLAGS)
                if minimum is not None:
                    shift = builder.fmul(arguments[1], minimum, _FLAGS)
                    added = builder.fadd(added, _spread(builder, shift), _FLAGS)
                _store(builder, sums, at, builder.fadd(summed, added, _FLAGS))
        return context.get_dummy_value()

    return types.none(total, scale, row), generate


# ---- 12 bits -----------------------------------------------------------------------------------

_CODED = from_dtype(Encoding.LOSSLESS_12.value)
_EXPONENT_SHIFT, _ONE = 23, 127  # of float32: where its exponent is, and that of 1.0
_SIGN_AND_MANTISSA = -0x7F810000  # the bits of these that bfloat16 has


class _CodedRow:
    """Instructions that read one row of 12 bits of `columns` values."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any, columns: Any) -> None:
        made = context.make_array(kind)(context, builder, array)
        self._builder, self._columns = builder, columns
        self._bytes = builder.bitcast(made.data, _BYTE.as_pointer())
        self.groups = builder.udiv(columns, _INDEX(GROUP))
        at = builder.add(columns, builder.lshr(columns, _INDEX(1)))
        base = builder.zext(_load(builder, self._bytes, at, _BYTE), _INT)
        power = builder.shl(builder.add(base, _INT(_ONE)), _INT(_EXPONENT_SHIFT))
        self._power = _spread(builder, builder.bitcast(power, _FLOAT))  # 2 ** base
        self._patches = builder.add(at, _INDEX(PATCH_BYTES))  # the base takes as much as a patch
        words = cgutils.unpack_tuple(builder, made.shape, 1)[0]
        size_bytes = builder.sub(builder.mul(words, _INDEX(2)), self._patches)
        self._patches_max = builder.sdiv(size_bytes, _INDEX(PATCH_BYTES))

    def halves(self, group: Any) -> tuple[Any, Any]:
        """The values of a group as two vectors of floats, 0 where there are patches."""
        builder = self._builder
        at = builder.add(self._columns, builder.mul(group, _INDEX(_LANES)))
        codes = builder.zext(_load(builder, self._bytes, at, _BYTES), _INTS)
        low = builder.shl(codes, _same(_EXPONENT_SHIFT))
        high = builder.shl(codes, _same(_EXPONENT_SHIFT - 4))
        start = builder.mul(group, _INDEX(GROUP))
        return self._values(start, low), self._values(builder.add(start, _INDEX(_LANES)), high)

    def _values(self, at: Any, codes: Any) -> Any:
        """codes: where a float's exponent is, with other bits around them."""
        builder = self._builder
        signed = _load(builder, self._bytes, at, _BYTES)
        places = [place for lane in range(_LANES) for place in (_LANES, _LANES, lane, lane)]
        indices = ir.VectorType(_INT, 4 * _LANES)(places)
        upper = builder.shuffle_vector(signed, _BYTES([0] * _LANES), indices)
        others = builder.and_(builder.bitcast(upper, _INTS), _same(_SIGN_AND_MANTISSA))
        exponents = builder.and_(codes, _same(15 << _EXPONENT_SHIFT))
        small = builder.bitcast(builder.or_(others, exponents), _FLOATS)
        return _fence(builder, builder.fmul(small, self._power))

    @contextmanager
    def each_patch(self) -> Iterator[tuple[Any, Any]]:
        """A loop over columns and values (floats) of the patches, up to the first without."""
        builder = self._builder
        with cgutils.for_range(builder, self._patches_max) as loop:
            at = builder.add(self._patches, builder.mul(loop.index, _INDEX(PATCH_BYTES)))
            column = builder.zext(_load(builder, self._bytes, at, _WORD), _INDEX)
            ends = builder.icmp_unsigned(">=", column, self._columns)
            with builder.if_then(ends, likely=False):
                loop.do_break()
            word = _load(builder, self._bytes, builder.add(at, _INDEX(2)), _WORD)
            pattern = builder.shl(builder.zext(word, _INT), _INT(16))
            yield column, builder.bitcast(pattern, _FLOAT)


def _fence(builder: Any, values: Any) -> Any:
    """The values, computed before anything is done with them.

    Compilers that may reorder sums would sum what is small first, and lose bits of it.
    """
    kind = ir.FunctionType(_FLOATS, [_FLOATS])
    name = f"llvm.arithmetic.fence.v{_LANES}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [values])


def _same(value: int) -> Any:
    return _INTS([value] * _LANES)


@intrinsic
def _dot_codes(typing_context: Any, x: Any, row: Any) -> Any:
    """x . row."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        inputs, columns = _floats_of(context, builder, x, arguments[0])
        coded = _CodedRow(context, builder, row, arguments[1], columns)
        sums = [cgutils.alloca_once_value(builder, _FLOATS([0.0] * _LANES)) for _ in range(2)]
        with cgutils.for_range(builder, coded.groups) as loop:
            for half, values in enumerate(coded.halves(loop.index)):
                at = builder.add(builder.mul(loop.index, _INDEX(GROUP)), _INDEX(half * _LANES))
                products = builder.fmul(values, _load(builder, inputs, at, _FLOATS), _FLAGS)
                summed = builder.fadd(builder.load(sums[half]), products, _FLAGS)
                builder.store(summed, sums[half])
        both = builder.fadd(builder.load(sums[0]), builder.load(sums[1]), _FLAGS)
        total = cgutils.alloca_once_value(builder, _sum_lanes(builder, both))
        with coded.each_patch() as (column, value):
            product = builder.fmul(value, _load(builder, inputs, column, _FLOAT), _FLAGS)
            builder.store(builder.fadd(builder.load(total), product, _FLAGS), total)
        return builder.load(total)

    return types.float32(x, row), generate


@intrinsic
def _add_codes(typing_context: Any, total: Any, scale: Any, row: Any) -> Any:
    """total += scale * row."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, columns = _floats_of(context, builder, total, arguments[0])
        coded = _CodedRow(context, builder, row, arguments[2], columns)
        factor = _spread(builder, arguments[1])
        with cgutils.for_range(builder, coded.groups) as loop:
            for half, values in enumerate(coded.halves(loop.index)):
                at = builder.add(builder.mul(loop.index, _INDEX(GROUP)), _INDEX(half * _LANES))
                added = builder.fmul(values, factor, _FLAGS)
                summed = builder.fadd(_load(builder, sums, at, _FLOATS), added, _FLAGS)
                _store(builder, sums, at, summed)
        with coded.each_patch() as (column, value):
            added = builder.fmul(value, arguments[1], _FLAGS)
            summed = builder.fadd(_load(builder, sums, column, _FLOAT), added, _FLAGS)
            _store(builder, sums, column, summed)
        return context.get_dummy_value()

    return types.none(total, scale, row), generate


@intrinsic
def _widen_codes(typing_context: Any, row: Any, out: Any) -> Any:
    """out = row."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        floats, columns = _floats_of(context, builder, out, arguments[1])
        coded = _CodedRow(context, builder, row, arguments[0], columns)
        with cgutils.for_range(builder, coded.groups) as loop:
            for half, values in enumerate(coded.halves(loop.index)):
                at = builder.add(builder.mul(loop.index, _INDEX(GROUP)), _INDEX(half * _LANES))
                _store(builder, floats, at, values)
        with coded.each_patch() as (column, value):
            _store(builder, floats, column, value)
        return context.get_dummy_value()

    return types.none(row, out), generate
