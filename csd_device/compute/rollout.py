"""The `rollout` program: the drive carries the hidden state through its own low-bit layers.

From a state behind attention of layer l it goes through the FFN of l, the attention of l + 1, the
FFN of l + 1, and so on, and scores the units of each layer on the state that reaches its FFN. So
one run answers for several layers, and a far one is scored on what its input will be, about, and
not on what the residual stream was layers ago.
"""

from dataclasses import dataclass

import numpy as np

from csd_device.compute.attention import Attention, KeyValues
from csd_device.compute.gated_ffn import GatedFfn, RowFormat, read_factors
from csd_device.compute.layer_names import numbered_layers
from csd_device.compute.layered import LayeredProgram, check_width
from csd_device.compute.low_bit_rows import PackedRows, rows_dot
from csd_device.compute.numbers import check_activation
from csd_device.compute.program import F32, NO_COST, U32, Cost, Origin, ProgramInput, Run
from csd_device.compute.shadow import correct_ffn
from csd_device.compute.tensor_file import TensorFile, invalid
from csd_device.errors import CommandError
from csd_protocol.program_file import ProgramKind, Tensor
from csd_protocol.status import Status


@dataclass(frozen=True, slots=True)
class LowBitAttention:
    """One layer's attention."""

    format: RowFormat
    norm: F32  # [hidden], divided by the channel scales
    q: PackedRows  # [heads * head_dim, hidden]
    k: PackedRows  # [kv_heads * head_dim, hidden]
    v: PackedRows  # [kv_heads * head_dim, hidden]
    o: PackedRows  # [hidden, heads * head_dim]
    q_bias: F32  # zeros where the file has none, as the other two
    k_bias: F32
    v_bias: F32

    @classmethod
    def read(
        cls, file: TensorFile, format_: RowFormat, shape: Attention, layer: int
    ) -> "LowBitAttention":
        """Raises CommandError (Invalid Program Data) naming the tensor at fault."""
        hidden = file.length(Tensor.ATTN_NORM.of(layer))
        norm = file.finite(Tensor.ATTN_NORM.of(layer), np.float32, (hidden,))
        factors = read_factors(file, Tensor.ATTN_CHANNEL_SCALE.of(layer), hidden)
        queries, kept = shape.query_width, shape.kv_width
        return cls(
            format=format_,
            norm=norm * factors,
            q=format_.rows(file, Tensor.Q, layer, (queries, hidden)),
            k=format_.rows(file, Tensor.K, layer, (kept, hidden)),
            v=format_.rows(file, Tensor.V, layer, (kept, hidden)),
            o=format_.rows(file, Tensor.O, layer, (hidden, queries)),
            q_bias=_bias(file, Tensor.Q_BIAS.of(layer), queries),
            k_bias=_bias(file, Tensor.K_BIAS.of(layer), kept),
            v_bias=_bias(file, Tensor.V_BIAS.of(layer), kept),
        )

    def add_to(self, entered: F32, memory: KeyValues, place: int, first: int) -> F32:
        """States [rows, hidden] behind this attention, of those that entered the layer.

        `place` is the layer's in the memory, `first` the position of row 0.
        """
        inputs = self.format.normed(entered, self.norm)
        queries = rows_dot(self.q, inputs) + self.q_bias
        keys = rows_dot(self.k, inputs) + self.k_bias
        values = rows_dot(self.v, inputs) + self.v_bias
        attended = memory.attend(place, first, queries, keys, values)
        ones = np.ones(self.o.columns, np.float32)
        left: F32 = entered + rows_dot(self.o, self.format.plain(attended, ones))
        return left

    def keep(self, entered: F32, memory: KeyValues, place: int, first: int) -> None:
        """Keys and values of states [rows, hidden] that entered the layer; as `add_to`."""
        inputs = self.format.normed(entered, self.norm)
        keys, values = rows_dot(self.k, inputs) + self.k_bias, rows_dot(self.v, inputs)
        memory.keep(place, first, keys, values + self.v_bias)

    def cost(self, shape: Attention, first: int, rows: int) -> Cost:
        matrices = (self.q, self.k, self.v, self.o)
        ops = 2 * rows * sum(matrix.count * matrix.columns for matrix in matrices)
        dram_bytes = sum(matrix.nbytes for matrix in matrices)
        return Cost(ops + shape.ops(first, rows), dram_bytes + shape.kept_bytes(first, rows))

    def keep_cost(self, rows: int) -> Cost:
        values = self.k.count * self.k.columns + self.v.count * self.v.columns
        return Cost(2 * rows * values, self.k.nbytes + self.v.nbytes)


@dataclass(frozen=True, slots=True)
class RolloutLayer:
    """One decoder layer."""

    attention: LowBitAttention
    ffn: GatedFfn

    @property
    def units(self) -> int:
        return self.ffn.units


class RolloutProgram(LayeredProgram[RolloutLayer]):
    """Scores on states that it rolls forward itself; see `Program`."""

    kind = ProgramKind.ROLLOUT

    def __init__(self, file: TensorFile) -> None:
        """Raises CommandError (Invalid Program Data) naming the tensor or the metadata at fault."""
        super().__init__(file)
        check_activation(file)
        self.shape = Attention.of(file)
        format_ = RowFormat.of(file)
        for layer in numbered_layers(file, Tensor.NORM):
            attention = LowBitAttention.read(file, format_, self.shape, layer)
            self._layers[layer] = RolloutLayer(attention, GatedFfn.read(file, format_, layer))
        self.first_layer = min(self._layers)
        self._check_layers()
        self.memory_bytes = self.shape.memory_bytes(len(self._layers))

    def new_memory(self) -> KeyValues:
        return KeyValues(self.shape, len(self._layers))

    def begin(self, given: ProgramInput, memory: KeyValues | None = None) -> Run:
        assert memory is not None
        origin = given.origin
        if origin is None:
            raise CommandError(
                Status.INVALID_FIELD,
                "a rollout needs to know which layer its hidden states are of: set the origin",
            )
        check_width(given.hidden, self.layer(origin.layer).ffn.hidden)
        return _Rollout(self, memory, given.hidden, origin, given.token)

    def correct(self, layer: int, inputs: F32, computed: U32) -> tuple[F32, Cost]:
        return correct_ffn(self.layer(layer).ffn, inputs, computed)

    def _check_layers(self) -> None:
        """Raises CommandError (Invalid Program Data) for layers that no state can pass through."""
        numbers = self.layers
        if numbers != tuple(range(numbers[0], numbers[0] + len(numbers))):
            raise invalid(f"layers {numbers[0]} to {numbers[-1]} have gaps; a rollout needs each")
        widths = {layer.ffn.hidden for layer in self._layers.values()}
        widths |= {layer.attention.norm.size for layer in self._layers.values()}
        if len(widths) != 1:
            raise invalid(f"layers of different hidden sizes: {sorted(widths)}")
        for number, layer in self._layers.items():
            if layer.ffn.down is None:
                raise invalid(f"tensor {Tensor.DOWN.of(number)} is missing")


class _Rollout:
    """One command's states on their way; layers passed keep their scores."""

    def __init__(
        self, program: RolloutProgram, memory: KeyValues, hidden: F32, origin: Origin, first: int
    ) -> None:
        self._program = program
        self._memory = memory
        self._first = first
        self._state = hidden  # [rows, hidden], behind attention of `_layer` once that is scored
        self._layer = origin.layer
        self._origin = origin
        self._products: tuple[F32, F32] | None = None  # gate and up of `_layer`
        self._scores: dict[int, F32] = {}
        self._cost = NO_COST

    def score(self, layer: int) -> tuple[F32, Cost]:
        self._program.layer(layer)
        if layer < self._origin.layer:
            raise CommandError(
                Status.INVALID_FIELD,
                f"layer {layer} lies before layer {self._origin.layer}, where the states are from",
            )
        if self._products is None:
            self._memory.begin(self._first, self._state.shape[0])
            self._arrive(through_attention=not self._origin.behind_attention)
        while self._layer < layer:
            self._leave()
            self._arrive(through_attention=True)
        cost, self._cost = self._cost, NO_COST
        return self._scores[layer], cost

    def remember(self, layer: int) -> Cost:
        """Keys and values of a layer, if the states entered it; else what passing it leaves."""
        if self._origin != Origin(layer, behind_attention=False) or self._products is not None:
            return self.score(layer)[1]
        attention = self._program.layer(layer).attention
        place = layer - self._program.first_layer
        attention.keep(self._state, self._memory, place, self._first)
        return attention.keep_cost(self._state.shape[0])

    def _arrive(self, through_attention: bool) -> None:
        """From states that entered a layer, or are behind its attention, to its scores."""
        layer, rows = self._program.layer(self._layer), self._state.shape[0]
        if through_attention:
            place = self._layer - self._program.first_layer
            self._state = layer.attention.add_to(self._state, self._memory, place, self._first)
            self._cost += layer.attention.cost(self._program.shape, self._first, rows)
        self._products = layer.ffn.products(self._state)
        self._scores[self._layer] = layer.ffn.score(*self._products)
        self._cost += layer.ffn.score_cost(rows)

    def _leave(self) -> None:
        """From behind attention of a layer to what enters the next."""
        ffn = self._program.layer(self._layer).ffn
        assert self._products is not None
        self._state = self._state + ffn.contribution(*self._products)
        self._cost += ffn.contribution_cost(self._state.shape[0])
        self._layer += 1


def _bias(file: TensorFile, name: str, size: int) -> F32:
    given = file.optional(name, (size,))
    return np.zeros(size, np.float32) if given is None else given
