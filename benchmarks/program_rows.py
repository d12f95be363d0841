"""Products and sums of a program's rows, straight from their bytes, over NumPy's on float32 rows.

The matrix is that of an FFN of a model of a billion parameters or so; one hidden state meets all of
its rows (products, as when units are scored), or all of its rows are added up, each times a factor
(sums, as in a correction). Ours run on one thread; NumPy may take what it likes. Rounds alternate.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from benchmarks.ratio import Ratio
from benchmarks.stopwatch import medians_of
from csd_device.compute.half_rows import half_dot
from csd_device.compute.low_bit_rows import Activations, PackedRows, add_rows, rows_dot
from csd_protocol.low_bit import LEVEL_BITS, quantise_rows

F32 = npt.NDArray[np.float32]

FLOOR = 0.5
GROUP = 64


def run(tiny: bool) -> list[Ratio]:
    rows, columns, rounds = (64, 128, 3) if tiny else (8192, 2048, 25)
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((rows, columns), np.float32)
    inputs = rng.standard_normal((1, columns), np.float32)
    factors = rng.standard_normal((1, rows), np.float32)
    half = weights.astype(np.float16).view(np.uint16)
    dot, total = partial(np.matmul, inputs, weights.T), partial(np.matmul, factors, weights)
    products = partial(half_dot, half, inputs)
    ratios = [_compare("products with rows of float16", rows, products, dot, rounds)]
    for bits in LEVEL_BITS:
        packed, scales = quantise_rows(weights, bits, GROUP)
        low = PackedRows(packed, scales.view(np.uint16), bits)
        products, sums = partial(_products, low, inputs), partial(add_rows, low, factors)
        ratios += [
            _compare(f"products with rows of {bits} bits", rows, products, dot, rounds),
            _compare(f"sums of rows of {bits} bits", rows, sums, total, rounds),
        ]
    return ratios


def _products(rows: PackedRows, inputs: F32) -> F32:
    ones = np.ones(inputs.shape[1], np.float32)
    return rows_dot(rows, Activations.scaled(inputs, ones, rows.bits, GROUP))


def _compare(
    name: str, rows: int, ours: Callable[[], object], reference: Callable[[], object], rounds: int
) -> Ratio:
    ours_s, reference_s = medians_of(ours, reference, rounds)
    return Ratio(
        name=name,
        ours=rows / ours_s,
        reference=rows / reference_s,
        unit="rows/s",
        floor=FLOOR,
        against="NumPy, float32 rows",
        notes="one thread, one hidden state",
    )
