"""Rows of units at 12, 8 and 4 bits over rows at 16 bits, and over torch's own 4-bit kernel.

One hidden state meets all rows of a matrix that is larger than a core's caches, as in decoding; at
12 bits, where a value takes more instructions than at 16, also rows that fit into them.
Ours are in float32, from the bytes as they lie on the drive. torch's kernel takes a layout of its
own, which staged units would first have to be brought into (that time is not counted), and
activations in bfloat16. Rounds alternate.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.ratio import Ratio
from benchmarks.stopwatch import medians_of
from csd_protocol.lossless_units import encode_rows
from csd_protocol.low_bit_units import GROUP
from csd_protocol.packed import Bits
from host_client.model.unit_bits import rounded
from host_client.runtime import kernels
from host_client.runtime.row_arithmetic import Encoding

F32 = npt.NDArray[np.float32]
Run = Callable[[], object]

FLOORS = {8: 1.0, 4: 1.5}
LOSSLESS_FLOOR, CACHED_FLOOR = 0.9, 0.75
TORCH_FLOOR = 0.3
ENCODINGS: dict[Bits, Encoding] = {8: Encoding.LEVELS_8, 4: Encoding.LEVELS_4}
CACHED_ROWS = 64  # 200 KB in 12 bits


def run(tiny: bool) -> list[Ratio]:
    rows, columns, rounds = (64, 128, 3) if tiny else (8192, 2048, 25)
    rng = np.random.default_rng(3)
    values = rng.standard_normal((rows, columns), np.float32)
    inputs, out = rng.standard_normal((1, columns), np.float32), np.empty((1, rows), np.float32)
    half = values.astype(np.float16).view(np.uint16)
    wide = partial(kernels.rows_dot, inputs, half, None, out, Encoding.HALF)
    ratios = _of_12_bits(values, inputs, rounds)
    for bits, encoding in ENCODINGS.items():
        words = rounded(values, bits).view(np.uint16)
        ours = partial(kernels.rows_dot, inputs, words, None, out, encoding)
        name, floor = f"products with rows of {bits} bits", FLOORS[bits]
        ratios.append(_compare(name, rows, ours, wide, rounds, "rows of float16", floor))
    theirs = _torch_product(rng, inputs, rows)
    against = "torch, int4pack, bfloat16"
    name = "products with rows of 4 bits"
    return [*ratios, _compare(name, rows, ours, theirs, rounds, against, TORCH_FLOOR)]


def _of_12_bits(values: F32, inputs: F32, rounds: int) -> list[Ratio]:
    """Over the same values in bfloat16."""
    patterns = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    half = patterns.view(np.uint16)
    words = encode_rows(half).view(np.uint16)
    ratios = []
    for name, rows, floor in (
        ("products with rows of 12 bits", len(values), LOSSLESS_FLOOR),
        ("products with cached rows of 12 bits", min(CACHED_ROWS, len(values)), CACHED_FLOOR),
    ):
        out = np.empty((1, rows), np.float32)
        ours = partial(kernels.rows_dot, inputs, words[:rows], None, out, Encoding.LOSSLESS_12)
        wide = partial(kernels.rows_dot, inputs, half[:rows], None, out, Encoding.BFLOAT16)
        ratios.append(_compare(name, rows, ours, wide, rounds, "rows of bfloat16", floor))
    return ratios


def _torch_product(rng: np.random.Generator, inputs: F32, rows: int) -> Run:
    """A product of the same size by torch's 4-bit kernel."""
    library: Any = torch
    columns = inputs.shape[1]
    levels = torch.from_numpy(rng.integers(0, 16, (rows, columns), np.int32))
    packed = library._convert_weight_to_int4pack_for_cpu(levels, 1)
    numbers = torch.rand(columns // GROUP, rows, 2).to(torch.bfloat16)
    narrow = torch.from_numpy(inputs).to(torch.bfloat16)
    return partial(library._weight_int4pack_mm_for_cpu, narrow, packed, GROUP, numbers)


def _compare(
    name: str, rows: int, ours: Run, reference: Run, rounds: int, against: str, floor: float
) -> Ratio:
    ours_s, reference_s = medians_of(ours, reference, rounds)
    return Ratio(
        name=name,
        ours=rows / ours_s,
        reference=rows / reference_s,
        unit="rows/s",
        floor=floor,
        against=against,
        notes="one hidden state",
    )
