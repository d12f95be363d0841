"""The `farsight` program: a small transformer that speaks for all layers from one hidden state.

Its blocks run once a command over the command's rows, which are consecutive positions; then each
layer has a head of its own. Keys and values of earlier positions are kept for each host.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csd_device.compute.attention import Attention, KeyValues
from csd_device.compute.half_rows import gated, half_dot, highest_over_rows, rms_norm
from csd_device.compute.layer_names import numbered_layers
from csd_device.compute.layered import LayeredProgram, check_width
from csd_device.compute.numbers import check_activation, rms_eps
from csd_device.compute.program import F32, NO_COST, Cost, ProgramInput, Run
from csd_device.compute.tensor_file import TensorFile, invalid
from csd_protocol.program_file import ProgramKind, Tensor

U16 = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Block:
    """One block; float16 as its bits."""

    attn_norm: F32  # [width]
    q: U16  # [heads * head_dim, width]
    k: U16  # [kv_heads * head_dim, width]
    v: U16  # [kv_heads * head_dim, width]
    o: U16  # [width, heads * head_dim]
    ffn_norm: F32  # [width]
    gate: U16  # [inner, width]
    up: U16  # [inner, width]
    down: U16  # [width, inner]

    @classmethod
    def read(cls, file: TensorFile, shape: Attention, width: int, number: int) -> "Block":
        """Raises CommandError (Invalid Program Data) naming the tensor at fault."""
        inner, _ = file.matrix_shape(Tensor.BLOCK_GATE.of(number))
        queries, kept = shape.query_width, shape.kv_width
        return cls(
            attn_norm=file.finite(Tensor.BLOCK_ATTN_NORM.of(number), np.float32, (width,)),
            q=file.half(Tensor.BLOCK_Q.of(number), (queries, width)),
            k=file.half(Tensor.BLOCK_K.of(number), (kept, width)),
            v=file.half(Tensor.BLOCK_V.of(number), (kept, width)),
            o=file.half(Tensor.BLOCK_O.of(number), (width, queries)),
            ffn_norm=file.finite(Tensor.BLOCK_FFN_NORM.of(number), np.float32, (width,)),
            gate=file.half(Tensor.BLOCK_GATE.of(number), (inner, width)),
            up=file.half(Tensor.BLOCK_UP.of(number), (inner, width)),
            down=file.half(Tensor.BLOCK_DOWN.of(number), (width, inner)),
        )

    @property
    def values(self) -> int:
        """Of its matrices."""
        matrices = (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)
        return sum(matrix.size for matrix in matrices)


@dataclass(frozen=True, slots=True)
class Head:
    """What one layer's units are scored with."""

    weight: U16  # [units, width]
    bias: F32 | None  # [units]

    @property
    def units(self) -> int:
        return len(self.weight)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


class FarsightProgram(LayeredProgram[Head]):
    """Scores are head . features + bias; see `Program`."""

    kind = ProgramKind.FARSIGHT

    def __init__(self, file: TensorFile) -> None:
        """Raises CommandError (Invalid Program Data) naming the tensor or the metadata at fault."""
        super().__init__(file)
        check_activation(file)
        self._rms_eps = rms_eps(file)
        self._shape = Attention.of(file)
        hidden = file.length(Tensor.INPUT_NORM)
        width = file.length(Tensor.OUTPUT_NORM)
        self._input_norm: F32 = file.finite(Tensor.INPUT_NORM, np.float32, (hidden,))
        self._input = file.half(Tensor.INPUT, (width, hidden))
        self._output_norm: F32 = file.finite(Tensor.OUTPUT_NORM, np.float32, (width,))
        blocks = numbered_layers(file, Tensor.BLOCK_Q)
        if blocks != list(range(len(blocks))):
            raise invalid(f"blocks are numbered {blocks[0]} to {blocks[-1]}, not from 0 on")
        self._blocks = [Block.read(file, self._shape, width, number) for number in blocks]
        for layer in numbered_layers(file, Tensor.HEAD):
            self._layers[layer] = _read_head(file, layer, width)
        self.memory_bytes = self._shape.memory_bytes(len(blocks))

    def new_memory(self) -> KeyValues:
        return KeyValues(self._shape, len(self._blocks))

    def begin(self, given: ProgramInput, memory: KeyValues | None = None) -> Run:
        assert memory is not None
        check_width(given.hidden, self._input_norm.size)
        return _Sight(self, given, memory)

    def features(self, hidden: F32, memory: KeyValues, first: int) -> F32:
        """[rows, width] of hidden [rows, hidden] at positions from `first` on."""
        state = half_dot(self._input, rms_norm(hidden, self._input_norm, self._rms_eps))
        for place, block in enumerate(self._blocks):
            inputs = rms_norm(state, block.attn_norm, self._rms_eps)
            queries, keys = half_dot(block.q, inputs), half_dot(block.k, inputs)
            attended = memory.attend(place, first, queries, keys, half_dot(block.v, inputs))
            state = state + half_dot(block.o, attended)
            inputs = rms_norm(state, block.ffn_norm, self._rms_eps)
            activities = gated(half_dot(block.gate, inputs), half_dot(block.up, inputs))
            state = state + half_dot(block.down, activities)
        return rms_norm(state, self._output_norm, self._rms_eps)

    def features_cost(self, first: int, rows: int) -> Cost:
        values = self._input.size + sum(block.values for block in self._blocks)
        kept_bytes = len(self._blocks) * self._shape.kept_bytes(first, rows)
        ops = 2 * values * rows + len(self._blocks) * self._shape.ops(first, rows)
        return Cost(ops, 2 * values + kept_bytes)

    def score_features(self, layer: int, features: F32) -> F32:
        """Scores float32 [units] of features [rows, width]."""
        head = self.layer(layer)
        products = half_dot(head.weight, features)
        if head.bias is not None:
            products += head.bias
        return highest_over_rows(products)

    def cost(self, layer: int, rows: int) -> Cost:
        """Of the layer's head alone."""
        head = self.layer(layer)
        return Cost(ops=2 * head.weight.size * rows, dram_bytes=head.nbytes)


class _Sight:
    """One command's features, made when the first layer is scored."""

    def __init__(self, program: FarsightProgram, given: ProgramInput, memory: KeyValues) -> None:
        self._program, self._given, self._memory = program, given, memory
        self._features: F32 | None = None

    def score(self, layer: int) -> tuple[F32, Cost]:
        cost = self._see(layer, 0) + self._program.cost(layer, self._given.hidden.shape[0])
        assert self._features is not None
        return self._program.score_features(layer, self._features), cost

    def remember(self, layer: int) -> Cost:
        """The features alone, of as many rows as positions are kept: of more, the last ones."""
        return self._see(layer, max(0, self._given.hidden.shape[0] - self._memory.context))

    def _see(self, layer: int, early: int) -> Cost:
        """Makes the features, once, of the rows behind the `early` ones; what that costs."""
        self._program.layer(layer)
        if self._features is not None:
            return NO_COST
        hidden, first = self._given.hidden[early:], self._given.token + early
        self._memory.begin(first, hidden.shape[0])
        self._features = self._program.features(hidden, self._memory, first)
        return self._program.features_cost(first, hidden.shape[0])


def _read_head(file: TensorFile, layer: int, width: int) -> Head:
    units, _ = file.matrix_shape(Tensor.HEAD.of(layer))
    return Head(
        weight=file.half(Tensor.HEAD.of(layer), (units, width)),
        bias=file.optional(Tensor.HEAD_BIAS.of(layer), (units,)),
    )
