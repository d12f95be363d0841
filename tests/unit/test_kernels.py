"""The kernels against torch in float64, on every format of rows and both paths."""

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csd_protocol.lossless_units import encode_rows, lossless_row_bytes
from csd_protocol.low_bit_units import decode_rows
from host_client.model.unit_bits import rounded
from host_client.runtime import kernels
from host_client.runtime.row_arithmetic import Encoding

ENCODINGS = {False: Encoding.HALF, True: Encoding.BFLOAT16}
DTYPES = {False: torch.float16, True: torch.bfloat16}


def make_weights(count: int, columns: int, bf16: bool, seed: int = 7) -> tuple[np.ndarray, ...]:
    """Random weights as the drive stores them, and the same values in float64."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, columns, generator=generator).mul_(0.05).to(DTYPES[bf16])
    return values.view(torch.int16).numpy().view(np.uint16), values.double().numpy()


def make_floats(*shape: int, seed: int = 11) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 2e-6) -> None:
    """To `tolerance` of the largest value: cancellation makes small ones relatively worse."""
    error = np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max()
    assert error < tolerance, error


def true_activations(x: np.ndarray, units: np.ndarray) -> np.ndarray:
    gate, up, _ = np.split(units, 3, axis=1)
    pre = x.astype(np.float64) @ gate.T
    return pre / (1 + np.exp(-pre)) * (x.astype(np.float64) @ up.T)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp16", "bf16"])
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 33])
@pytest.mark.parametrize("hidden,count", [(64, 40), (576, 1536)])
def test_neurons_add_what_the_dense_ffn_gives(
    bf16: bool, tokens: int, hidden: int, count: int
) -> None:
    bits, units = make_weights(count, 3 * hidden, bf16)
    x, out = make_floats(tokens, hidden), make_floats(tokens, hidden, seed=3)
    before = out.astype(np.float64)
    activity = np.empty((tokens, count), np.float32)
    kernels.neurons(x, bits, None, out, ENCODINGS[bf16], activity)
    acts = true_activations(x, units)
    assert_close(out, before + acts @ units[:, 2 * hidden :])
    assert_close(activity, np.abs(acts))


@pytest.mark.parametrize("tokens", [1, 12])
def test_neurons_of_some_rows_are_those_rows_alone(tokens: int) -> None:
    bits, units = make_weights(300, 3 * 96, False)
    rows = np.random.default_rng(1).choice(300, 101, replace=False)
    x, out = make_floats(tokens, 96), np.zeros((tokens, 96), np.float32)
    activity = np.empty((x.shape[0], 101), np.float32)
    kernels.neurons(x, bits, rows, out, Encoding.HALF, activity)
    acts = true_activations(x, units[rows])
    assert_close(out, acts @ units[rows, 192:])
    assert_close(activity, np.abs(acts))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp16", "bf16"])
@pytest.mark.parametrize("tokens", [1, 4, 17])
@pytest.mark.parametrize("count", [5, 3000])
def test_rows_dot_is_a_matrix_product(bf16: bool, tokens: int, count: int) -> None:
    bits, weights = make_weights(count, 576, bf16)
    rows = np.random.default_rng(2).permutation(count)[: count - 2]
    x = make_floats(tokens, 576)
    for picked, reference in ((None, weights), (rows, weights[rows])):
        out = np.full((tokens, reference.shape[0]), np.nan, np.float32)
        kernels.rows_dot(x, bits, picked, out, ENCODINGS[bf16])
        assert_close(out, x.astype(np.float64) @ reference.T)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp16", "bf16"])
@pytest.mark.parametrize("tokens", [1, 4, 17])
@pytest.mark.parametrize("count", [5, 3000])
def test_rows_axpy_adds_a_matrix_product(bf16: bool, tokens: int, count: int) -> None:
    bits, weights = make_weights(count, 576, bf16)
    rows = np.random.default_rng(2).permutation(count)[: count - 2]
    for picked, reference in ((None, weights), (rows, weights[rows])):
        a, out = make_floats(tokens, reference.shape[0]), make_floats(tokens, 576, seed=5)
        before = out.astype(np.float64)
        kernels.rows_axpy(a, bits, picked, out, ENCODINGS[bf16])
        assert_close(out, before + a.astype(np.float64) @ reference)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, 3, 12])
@pytest.mark.parametrize("hidden,count", [(32, 40), (576, 1536)])
def test_levels_give_what_their_values_give(
    bits: int, tokens: int, hidden: int, count: int
) -> None:
    encoding = {8: Encoding.LEVELS_8, 4: Encoding.LEVELS_4}[bits]
    rows = rounded(make_floats(3 * count, hidden, seed=8) * np.float32(0.05), bits)
    values = decode_rows(rows, hidden, bits)
    units, words = values.reshape(count, -1), rows.view(np.uint16)
    x, out = make_floats(tokens, hidden), np.zeros((tokens, hidden), np.float32)
    kernels.neurons(x, words.reshape(count, -1), None, out, encoding)
    assert_close(out, true_activations(x, units) @ units[:, 2 * hidden :])
    picked = np.random.default_rng(2).permutation(3 * count)[: count + 1]
    for chosen, reference in ((None, values), (picked, values[picked])):
        products = np.empty((tokens, reference.shape[0]), np.float32)
        kernels.rows_dot(x, words, chosen, products, encoding)
        assert_close(products, x.astype(np.float64) @ reference.T)
        sums = np.ones((tokens, hidden), np.float32)
        kernels.rows_axpy(products, words, chosen, sums, encoding)
        assert_close(sums, 1 + products.astype(np.float64) @ reference)
        widened = np.empty(reference.shape, np.float32)
        kernels.widen_rows(words, chosen, widened, encoding)
        np.testing.assert_allclose(widened, reference, rtol=1e-6, atol=1e-8)


def make_coded(count: int, columns: int, scale: float = 0.05) -> tuple[np.ndarray, ...]:
    """Rows of 12 bits with patches at both ends and within, and their values in float64."""
    bits, _ = make_weights(count, columns, True, seed=9)
    values = torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)
    values.mul_(scale / 0.05)
    for column, factor in ((0, 2.0**-24), (columns // 2, 2.0**20), (columns - 1, 2.0**9)):
        values[column % 3 :: 3, column] *= factor
    patterns = values.view(torch.int16).numpy().view(np.uint16)
    return encode_rows(patterns).view(np.uint16), values.double().numpy(), patterns


def assert_summed(actual: np.ndarray, factors: np.ndarray, values: np.ndarray) -> None:
    """factors @ values, to 2e-6 of what the terms of each sum amount to."""
    wide = factors.astype(np.float64)
    assert (np.abs(actual - wide @ values) <= 2e-6 * (np.abs(wide) @ np.abs(values))).all()


@pytest.mark.parametrize("scale", [0.05, 1e-20])
@pytest.mark.parametrize("tokens", [1, 3, 12])
@pytest.mark.parametrize("hidden,count", [(32, 40), (96, 200), (576, 1536)])
def test_rows_of_12_bits_give_what_their_values_give(
    scale: float, tokens: int, hidden: int, count: int
) -> None:
    encoding = Encoding.LOSSLESS_12
    words, values, _ = make_coded(3 * count, hidden, scale)
    x = make_floats(tokens, hidden) * np.float32(1e-6)
    picked = np.random.default_rng(2).permutation(3 * count)[: count + 1]
    for chosen, reference in ((None, values), (picked, values[picked])):
        products = np.empty((tokens, reference.shape[0]), np.float32)
        kernels.rows_dot(x, words, chosen, products, encoding)
        assert_summed(products, x, reference.T)
        factors = make_floats(tokens, reference.shape[0], seed=4)
        sums = np.zeros((tokens, hidden), np.float32)
        kernels.rows_axpy(factors, words, chosen, sums, encoding)
        assert_summed(sums, factors, reference)
        widened = np.empty(reference.shape, np.float32)
        kernels.widen_rows(words, chosen, widened, encoding)
        assert np.array_equal(widened, reference.astype(np.float32))


@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_neurons_of_12_bits_are_those_of_16(tokens: int) -> None:
    words, _, patterns = make_coded(3 * 200, 96)
    x = make_floats(tokens, 96) * np.float32(1e-3)
    found, expected = np.zeros((2, tokens, 96), np.float32)
    kernels.neurons(x, words.reshape(200, -1), None, found, Encoding.LOSSLESS_12)
    kernels.neurons(x, patterns.reshape(200, -1), None, expected, Encoding.BFLOAT16)
    assert np.isfinite(expected).all()
    assert_close(found, expected.astype(np.float64))


@pytest.mark.parametrize("size", [0.05, 1e-39])
def test_every_pattern_in_12_bits_widens_as_in_16(size: float) -> None:
    strays = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 4)
    values = torch.from_numpy(make_floats(strays.shape[0], 128)).mul_(size).to(torch.bfloat16)
    patterns = values.view(torch.int16).numpy().view(np.uint16)
    patterns[:, [0, 31, 77, 127]] = strays
    coded, whole = np.empty((2, *patterns.shape), np.float32)
    kernels.widen_rows(encode_rows(patterns).view(np.uint16), None, coded, Encoding.LOSSLESS_12)
    kernels.widen_rows(patterns, None, whole, Encoding.BFLOAT16)
    assert np.array_equal(coded.view(np.uint32), whole.view(np.uint32))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1 << 32), st.sampled_from([32, 96, 640]), st.integers(1, 9))
def test_rows_of_12_bits_may_be_any_bytes(seed: int, columns: int, tokens: int) -> None:
    """Nothing before or behind what a kernel was given is written."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 1 << 16, (7, lossless_row_bytes(columns) // 2), np.uint16)
    words[::2, columns * 3 // 4 :] = rng.integers(0, columns + 2)  # patches within and just beyond
    guarded = np.full((tokens + 2, columns), 3, np.float32)
    sums = guarded[1:-1]
    kernels.rows_axpy(make_floats(tokens, 7), words, None, sums, Encoding.LOSSLESS_12)
    products = np.empty((tokens, 7), np.float32)
    kernels.rows_dot(make_floats(tokens, columns), words, None, products, Encoding.LOSSLESS_12)
    assert (guarded[[0, -1]] == 3).all()
    around = np.full((9, columns), 3, np.float32)
    kernels.widen_rows(words, None, around[1:-1], Encoding.LOSSLESS_12)
    assert (around[[0, -1]] == 3).all()


def test_rows_of_levels_that_do_not_fit_are_refused() -> None:
    rows = rounded(make_floats(10, 64), 4).view(np.uint16)
    with pytest.raises(ValueError, match="weights must be"):
        kernels.rows_dot(make_floats(1, 64), rows, None, make_floats(1, 10), Encoding.LEVELS_8)
    with pytest.raises(ValueError, match="whole groups"):
        kernels.rows_dot(make_floats(1, 63), rows, None, make_floats(1, 10), Encoding.LEVELS_4)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp16", "bf16"])
def test_every_16_bit_pattern_widens_as_torch_widens_it(bf16: bool) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    out = np.empty((256, 256), np.float32)
    kernels.widen_rows(bits, None, out, ENCODINGS[bf16])
    expected = torch.from_numpy(bits.view(np.int16)).view(DTYPES[bf16]).float().numpy()
    np.testing.assert_array_equal(out, expected)


def test_widen_rows_gathers_in_the_order_asked() -> None:
    bits, values = make_weights(50, 32, True)
    rows = np.array([49, 0, 0, 7])
    out = np.empty((4, 32), np.float32)
    kernels.widen_rows(bits, rows, out, Encoding.BFLOAT16)
    np.testing.assert_array_equal(out, values[rows].astype(np.float32))


def test_any_number_of_threads_gives_the_same_bits() -> None:
    bits, _ = make_weights(4000, 3 * 576, False)
    x = make_floats(2, 576)
    results = []
    for threads in (1, numba.config.NUMBA_NUM_THREADS):
        numba.set_num_threads(threads)
        out = np.zeros((2, 576), np.float32)
        kernels.neurons(x, bits, None, out, Encoding.HALF)
        results.append(out)
    np.testing.assert_array_equal(results[0], results[1])
    assert numba.threading_layer() == "workqueue"  # whose threads sleep between calls


def test_no_rows_add_nothing() -> None:
    bits, _ = make_weights(10, 3 * 64, False)
    none = np.empty(0, np.int64)
    for tokens in (1, 12):
        out = np.ones((tokens, 64), np.float32)
        kernels.neurons(make_floats(tokens, 64), bits, none, out, Encoding.HALF)
        assert (out == 1).all()


def test_nan_and_infinity_are_not_swallowed() -> None:
    bits, _ = make_weights(10, 64, False)
    x = make_floats(1, 64)
    x[0, 3] = np.nan
    out = np.zeros((1, 10), np.float32)
    kernels.rows_dot(x, bits, None, out, Encoding.HALF)
    assert np.isnan(out).all()


@pytest.mark.parametrize(
    "rows,message",
    [
        (np.array([0, 10]), "0..9"),
        (np.array([-1]), "0..9"),
        (np.array([1], np.int32), "int64"),
        (np.zeros((1, 1), np.int64), "int64"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: np.ndarray, message: str) -> None:
    bits, _ = make_weights(10, 3 * 64, False)
    with pytest.raises(ValueError, match=message):
        kernels.neurons(make_floats(1, 64), bits, rows, make_floats(1, 64), Encoding.HALF)


def test_shapes_types_and_layouts_that_do_not_fit_are_refused() -> None:
    bits, _ = make_weights(10, 3 * 64, False)
    x, out = make_floats(1, 64), make_floats(1, 64)
    with pytest.raises(ValueError, match="uint16"):
        kernels.neurons(x, bits.astype(np.float32), None, out, Encoding.HALF)
    with pytest.raises(ValueError, match="weights must be"):
        kernels.rows_dot(x, bits, None, out, Encoding.HALF)
    with pytest.raises(ValueError, match="out must be"):
        kernels.neurons(x, bits, None, make_floats(2, 64), Encoding.HALF)
    with pytest.raises(ValueError, match="x must be"):
        kernels.neurons(make_floats(1, 128)[:, ::2], bits, None, out, Encoding.HALF)
    with pytest.raises(ValueError, match="C-contiguous"):
        kernels.rows_dot(x, bits[:, :64], None, make_floats(1, 10), Encoding.HALF)
