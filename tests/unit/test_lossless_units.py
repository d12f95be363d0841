"""Rows of 12 bits: every value comes back bit for bit, or the row is refused."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csd_protocol.lossless_units import (
    COLS_MAX,
    NO_COLUMN,
    TooManyPatches,
    decode_rows,
    encode_rows,
    lossless_row_bytes,
    patches_of,
)
from csd_protocol.low_bit_units import GROUP

EXPONENTS = 256


def patterns_of(values: np.ndarray) -> np.ndarray:
    """The bits of values rounded to bfloat16, uint16."""
    rounded = torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def patches_in(rows: np.ndarray, cols: int) -> np.ndarray:
    """How many patches each row uses."""
    words = np.ascontiguousarray(rows[:, cols * 3 // 2 + 4 :]).view("<u2")
    return (words[:, ::2] < cols).sum(axis=1)


def fewest_patches(row: np.ndarray) -> int:
    """By trying every base, value for value."""
    exponents, bases = row >> 7 & 255, np.arange(128)[:, None]
    has_code = (bases < exponents) & (exponents <= bases + 15) | (bases == 0) & (exponents == 0)
    return int((~has_code & (row & 0x7FFF > 0)).sum(axis=1).min())


@st.composite
def rows_of_patterns(draw: st.DrawFn) -> np.ndarray:
    """Rows whose exponents mostly lie close together, anywhere; a few values are of any bits."""
    count, cols = draw(st.integers(1, 3)), draw(st.sampled_from([GROUP, 3 * GROUP, 16 * GROUP]))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    spread, lowest = draw(st.integers(1, 17)), draw(st.integers(0, EXPONENTS - 1))
    exponents = np.minimum(lowest + rng.integers(0, spread, (count, cols)), EXPONENTS - 1)
    patterns = (exponents << 7 | rng.integers(0, 128, (count, cols))).astype(np.uint16)
    patterns |= rng.integers(0, 2, (count, cols), np.uint16) << np.uint16(15)
    patterns[rng.random((count, cols)) < draw(st.sampled_from([0.0, 0.3]))] &= 0x8000  # zeros
    strays = draw(st.lists(st.tuples(st.integers(0, cols - 1), st.integers(0, 0xFFFF)), max_size=9))
    for column, pattern in strays:
        patterns[0, column] = pattern
    return patterns


@settings(deadline=None)  # the first example compiles
@given(rows_of_patterns())
def test_rows_come_back_bit_for_bit_or_are_refused(patterns: np.ndarray) -> None:
    cols = patterns.shape[1]
    needed = [fewest_patches(row) for row in patterns]
    if max(needed) > patches_of(cols):
        first = next(row for row, count in enumerate(needed) if count > patches_of(cols))
        with pytest.raises(TooManyPatches) as refusal:
            encode_rows(patterns)
        assert (refusal.value.row, refusal.value.patches) == (first, needed[first])
        return
    rows = encode_rows(patterns)
    assert rows.shape == (patterns.shape[0], lossless_row_bytes(cols))
    assert np.array_equal(decode_rows(rows, cols), patterns)
    assert patches_in(rows, cols).tolist() == needed


@pytest.mark.parametrize("size", [0.02, 1e-38, 1.0], ids=["usual", "subnormal", "one"])
def test_every_pattern_comes_back_among_others(size: float) -> None:
    """All 65,536: zeros of both signs, subnormals, infinities and NaN with what they carry."""
    cols, room = 512, patches_of(512)
    strays = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 4)
    normal = np.random.default_rng(1).standard_normal((strays.shape[0], cols)) * size
    patterns = patterns_of(normal)
    patterns[:, 100:104] = strays
    rows = encode_rows(patterns)
    assert np.array_equal(decode_rows(rows, cols), patterns)
    assert 4 <= patches_in(rows, cols).max() <= room


def test_a_row_has_the_bytes_that_the_format_says() -> None:
    values = np.zeros((1, GROUP), np.float32)
    values[0, :3], values[0, 17], values[0, 31] = (1.0, -1.5, -0.0), 2.0**-9, 1e30
    patterns = patterns_of(values)
    (row,) = encode_rows(patterns)
    base = int(row[48])
    assert row[:4].tolist() == [0x00, 0xC0, 0x80, 0]
    assert base == 127 - 15  # the lowest that has a code for 1.0
    assert row[32:36].tolist() == [15, 15 | 6 << 4, 0, 0]  # value 17 stands beside value 1
    assert row[47] == 0  # a patch is 0 where it would lie
    assert row[49:52].tolist() == [0, 0, 0]
    patches = row[52:].view("<u2")
    assert patches[:2].tolist() == [31, patterns[0, 31]]
    assert set(patches[2::2].tolist()) == {NO_COLUMN}


def test_a_row_is_full_when_its_patches_are() -> None:
    cols = 256
    room = patches_of(cols)
    patterns = patterns_of(np.ones((3, cols)))
    patterns[1, 5 : 5 + room] = patterns_of(np.full(room, 1e-20))
    assert np.array_equal(decode_rows(encode_rows(patterns), cols), patterns)
    patterns[2, : room + 1] = 0x7F80  # infinities
    message = f"row 2 needs {room + 1} patches and has {room}"
    with pytest.raises(TooManyPatches, match=message):
        encode_rows(patterns)


def test_rows_are_of_whole_groups_and_of_columns_that_a_patch_can_name() -> None:
    with pytest.raises(ValueError, match="whole groups"):
        lossless_row_bytes(GROUP + 1)
    with pytest.raises(ValueError, match=f"has {COLS_MAX} at most"):
        lossless_row_bytes(COLS_MAX + GROUP)
    patterns = patterns_of(np.ones((1, COLS_MAX)))
    patterns[0, -1] = 0x7F80
    assert np.array_equal(decode_rows(encode_rows(patterns), COLS_MAX), patterns)
    for cols, bits in ((576, 13.4), (2048, 12.51), (4096, 12.38), (14336, 12.29)):
        assert lossless_row_bytes(cols) % 64 == 0
        assert lossless_row_bytes(cols) * 8 / cols < bits
        assert patches_of(cols) >= cols // 128 + 4


Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
LAYERS: dict[str, tuple[Draw, int]] = {
    "normal": (lambda rng, shape: rng.standard_normal(shape), 8),
    "student-t 3": (lambda rng, shape: rng.standard_t(3, shape), 14),
    "student-t 2": (lambda rng, shape: rng.standard_t(2, shape), 20),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_as_models_have_them_need_few_patches(name: str) -> None:
    draw, most = LAYERS[name]
    values = draw(np.random.default_rng(5), (4096, 2048)) * 0.02
    rows = encode_rows(patterns_of(values))
    assert patches_in(rows, 2048).max() <= most < patches_of(2048)
