"""One low-bit FFN on the drive: what its units would add, and what those not computed do add.

With x the FFN's input, a unit's activity is silu(gate . x) * (up . x); it adds activity * down row
to the residual stream, so its score is |activity| * ||down row||.
"""

from dataclasses import dataclass

import numpy as np

from csd_device.compute.half_rows import gated, score_gated
from csd_device.compute.low_bit_rows import (
    ALL_ROWS,
    I64,
    Activations,
    PackedRows,
    add_rows,
    rows_dot,
)
from csd_device.compute.numbers import rms_eps, whole_number
from csd_device.compute.program import F32, Cost
from csd_device.compute.tensor_file import TensorFile, invalid
from csd_protocol.low_bit import check_layout
from csd_protocol.program_file import Key, Tensor

_BITS_MAX, _GROUP_MAX = 8, 1 << 20


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How the low-bit rows of one program are stored, and how their inputs are normed."""

    bits: int
    group: int
    rms_eps: float

    @classmethod
    def of(cls, file: TensorFile) -> "RowFormat":
        """Raises CommandError (Invalid Program Data) naming the metadata at fault."""
        return cls(
            whole_number(file, Key.BITS, 1, _BITS_MAX),
            whole_number(file, Key.GROUP, 1, _GROUP_MAX),
            rms_eps(file),
        )

    def rows(
        self, file: TensorFile, name: Tensor, layer: int, shape: tuple[int, int]
    ) -> PackedRows:
        """Low-bit rows of `shape` (rows, columns). Raises CommandError (Invalid Program Data)."""
        count, columns = shape
        try:
            check_layout(columns, self.bits, self.group)
        except ValueError as error:
            raise invalid(f"{name.of(layer)}: {error}") from error
        packed_shape, scales_shape = (
            (count, columns * self.bits // 8),
            (count, columns // self.group),
        )
        return PackedRows(
            file.tensor(name.of(layer), np.uint8, packed_shape),
            file.half(name.scale_of(layer), scales_shape),
            self.bits,
        )

    def normed(self, hidden: F32, norm: F32) -> Activations:
        return Activations.normed(hidden, norm, self.rms_eps, self.bits, self.group)

    def plain(self, inputs: F32, factors: F32) -> Activations:
        return Activations.scaled(inputs, factors, self.bits, self.group)


@dataclass(frozen=True, slots=True)
class GatedFfn:
    """One layer's FFN."""

    format: RowFormat
    norm: F32  # [hidden], divided by the channel scales
    factors: F32  # [hidden], one over the channel scales
    gate: PackedRows  # [units, hidden]
    up: PackedRows  # [units, hidden]
    down: PackedRows | None  # [units, hidden]
    down_norm: F32  # [units]

    @classmethod
    def read(cls, file: TensorFile, format_: RowFormat, layer: int) -> "GatedFfn":
        """Raises CommandError (Invalid Program Data) naming the tensor at fault."""
        hidden = file.length(Tensor.NORM.of(layer))
        units = file.length(Tensor.DOWN_NORM.of(layer))
        norm = file.finite(Tensor.NORM.of(layer), np.float32, (hidden,))
        factors = read_factors(file, Tensor.CHANNEL_SCALE.of(layer), hidden)
        down = None
        if file.has(Tensor.DOWN.of(layer)):
            down = format_.rows(file, Tensor.DOWN, layer, (units, hidden))
        return cls(
            format=format_,
            norm=norm * factors,
            factors=factors,
            gate=format_.rows(file, Tensor.GATE, layer, (units, hidden)),
            up=format_.rows(file, Tensor.UP, layer, (units, hidden)),
            down=down,
            down_norm=file.finite(Tensor.DOWN_NORM.of(layer), np.float32, (units,)),
        )

    @property
    def units(self) -> int:
        return self.down_norm.size

    @property
    def hidden(self) -> int:
        return self.norm.size

    def products(self, state: F32) -> tuple[F32, F32]:
        """Gate and up products [rows, units] of states [rows, hidden] before the RMSNorm."""
        inputs = self.format.normed(state, self.norm)
        return rows_dot(self.gate, inputs), rows_dot(self.up, inputs)

    def score(self, gate: F32, up: F32) -> F32:
        """Scores float32 [units] of the products."""
        return score_gated(gate, up, self.down_norm)

    def contribution(self, gate: F32, up: F32) -> F32:
        """What all units together add, float32 [rows, hidden]."""
        assert self.down is not None
        return add_rows(self.down, gated(gate, up))

    def correction(self, inputs: F32, others: I64) -> F32:
        """What the units `others` add for the FFN's own inputs, both float32 [rows, hidden]."""
        assert self.down is not None
        if not others.size:
            return np.zeros((inputs.shape[0], self.hidden), np.float32)
        split = self.format.plain(inputs, self.factors)
        chosen = ALL_ROWS if others.size == self.units else others
        activities = gated(rows_dot(self.gate, split, chosen), rows_dot(self.up, split, chosen))
        return add_rows(self.down, activities, chosen)

    def score_cost(self, rows: int) -> Cost:
        """Of the products and the scores."""
        values = self.units * self.hidden
        dram_bytes = self.gate.nbytes + self.up.nbytes + self.norm.nbytes + self.down_norm.nbytes
        return Cost(ops=4 * values * rows, dram_bytes=dram_bytes)

    def contribution_cost(self, rows: int) -> Cost:
        """Of what all units add, the products being there."""
        assert self.down is not None
        return Cost(ops=2 * self.units * self.hidden * rows, dram_bytes=self.down.nbytes)

    def correction_cost(self, rows: int, others: int) -> Cost:
        assert self.down is not None
        row_bytes = (self.gate.nbytes + self.up.nbytes + self.down.nbytes) // self.units
        return Cost(ops=6 * others * self.hidden * rows, dram_bytes=row_bytes * others)


def read_factors(file: TensorFile, name: str, columns: int) -> F32:
    """One over the channel scales [columns], all ones where the file has none."""
    scales = file.optional(name, (columns,))
    if scales is None:
        return np.ones(columns, np.float32)
    if not (scales > np.float32(1e-30)).all():
        raise invalid(f"tensor {name} has values that are not above 0")
    factors: F32 = np.float32(1) / scales
    return factors
