"""The `rollout` program: the drive carries the hidden state through its own low-bit layers.

From a state behind attention of layer l it goes through the FFN of l, the attention of l + 1, the
FFN of l + 1, and so on, and scores the units of each layer on the state that reaches its FFN, and
its KV groups by what each of them added on the way. So one run answers for several layers, and a
far one is scored on what its input will be, about, and not on what the residual stream was layers
ago.
"""

from dataclasses import dataclass

import numpy as np

from csd_device.compute.attention import Attention, KeyValues
from csd_device.compute.gated_ffn import GatedFfn, RowFormat, read_factors
from csd_device.compute.half_rows import highest_over_rows
from csd_device.compute.layer_names import numbered_layers
from csd_device.compute.layered import LayeredProgram, check_width
from csd_device.compute.low_bit_rows import PackedRows, rows_dot
from csd_device.compute.numbers import check_activation
from csd_device.compute.program import F32, NO_COST, U32, Cost, Origin, ProgramInput, Run
from csd_device.compute.shadow import correct_ffn
from csd_device.compute.tensor_file import TensorFile, invalid
from csd_device.errors import CommandError
from csd_protocol.packed import Role
from csd_protocol.program_file import Key, ProgramKind, Tensor
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

    def mixed(self, entered: F32, memory: KeyValues, place: int, first: int) -> F32:
        """The heads' values [rows, heads * head_dim] of states that entered the layer.

        `place` is the layer's in the memory, `first` the position of row 0.
        """
        inputs = self.format.normed(entered, self.norm)
        queries = rows_dot(self.q, inputs) + self.q_bias
        keys = rows_dot(self.k, inputs) + self.k_bias
        values = rows_dot(self.v, inputs) + self.v_bias
        return memory.attend(place, first, queries, keys, values)

    def projected(self, mixed: F32) -> F32:
        """What the heads' values [rows, heads * head_dim] add, [rows, hidden]."""
        ones = np.ones(self.o.columns, np.float32)
        return rows_dot(self.o, self.format.plain(mixed, ones))

    def group_norms(self, mixed: F32, groups: int) -> F32:
        """L2 norms of what each KV group adds, [rows, groups]."""
        rows, each = mixed.shape[0], np.arange(groups)
        apart = np.zeros((rows, groups, groups, mixed.shape[1] // groups), np.float32)
        apart[:, each, each] = mixed.reshape(rows, groups, -1)  # the others' values left out
        added = self.projected(apart.reshape(rows * groups, -1))
        norms: F32 = np.linalg.norm(added.reshape(rows, groups, -1), axis=2)
        return norms

    def keep(self, entered: F32, memory: KeyValues, place: int, first: int) -> None:
        """Keys and values of states [rows, hidden] that entered the layer; as `mixed`."""
        inputs = self.format.normed(entered, self.norm)
        keys, values = rows_dot(self.k, inputs) + self.k_bias, rows_dot(self.v, inputs)
        memory.keep(place, first, keys, values + self.v_bias)

    def cost(self, shape: Attention, first: int, rows: int) -> Cost:
        matrices = (self.q, self.k, self.v, self.o)
        ops = 2 * rows * sum(matrix.count * matrix.columns for matrix in matrices)
        dram_bytes = sum(matrix.nbytes for matrix in matrices)
        return Cost(ops + shape.ops(first, rows), dram_bytes + shape.kept_bytes(first, rows))

    def group_norms_cost(self, groups: int, rows: int) -> Cost:
        """The output projection once more, by group, and the squares."""
        ops = 2 * rows * self.o.count * (self.o.columns + groups)
        return Cost(ops, self.o.nbytes)

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
        if self.role is not Role.FFN:
            raise invalid(f"{Key.ROLE} is {self.role}; a rollout is of {Role.FFN}")
        check_activation(file)
        self.shape = Attention.of(file)
        format_ = RowFormat.of(file)
        for layer in numbered_layers(file, Tensor.NORM):
            attention = LowBitAttention.read(file, format_, self.shape, layer)
            self._layers[layer] = RolloutLayer(attention, GatedFfn.read(file, format_, layer))
        self.first_layer = min(self._layers)
        self._check_layers()
        self.kv_groups = self.shape.kv_heads
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
        self._state = hidden  # [rows, hidden], behind attention of `_layer` once that is reached
        self._layer = origin.layer
        self._origin = origin
        self._has_begun = False
        self._products: tuple[F32, F32] | None = None  # gate and up of `_layer`
        self._scores: dict[int, F32] = {}
        self._mixed: dict[int, F32] = {}  # the heads' values in each attention that was passed
        self._head_scores: dict[int, F32] = {}
        self._cost = NO_COST

    def score(self, layer: int) -> tuple[F32, Cost]:
        self._reach(layer)
        if layer == self._layer:
            self._score_units()
        return self._scores[layer], self._spent()

    def score_heads(self, layer: int) -> tuple[F32, Cost]:
        self._reach(layer)
        if layer not in self._mixed:
            raise CommandError(
                Status.INVALID_FIELD,
                f"the states are behind attention of layer {layer}, too late for its KV groups",
            )
        if layer not in self._head_scores:
            attention, groups = self._program.layer(layer).attention, self._program.kv_groups
            norms = attention.group_norms(self._mixed[layer], groups)
            self._head_scores[layer] = highest_over_rows(norms)
            self._cost += attention.group_norms_cost(groups, self._state.shape[0])
        return self._head_scores[layer], self._spent()

    def remember(self, layer: int) -> Cost:
        """Keys and values of a layer, if the states entered it; else what passing it leaves."""
        if self._origin != Origin(layer, behind_attention=False) or self._has_begun:
            self._reach(layer)
            return self._spent()
        attention = self._program.layer(layer).attention
        place = layer - self._program.first_layer
        attention.keep(self._state, self._memory, place, self._first)
        return attention.keep_cost(self._state.shape[0])

    def _reach(self, layer: int) -> None:
        """Takes the states to behind the attention of a layer, unless they were there.

        Raises CommandError (Invalid Field) for a layer that they cannot come to.
        """
        self._program.layer(layer)
        if layer < self._origin.layer:
            raise CommandError(
                Status.INVALID_FIELD,
                f"layer {layer} lies before layer {self._origin.layer}, where the states are from",
            )
        if not self._has_begun:
            self._memory.begin(self._first, self._state.shape[0])
            self._has_begun = True
            if not self._origin.behind_attention:
                self._attend()
        while self._layer < layer:
            self._leave()
            self._attend()

    def _attend(self) -> None:
        """From what entered a layer to behind its attention."""
        attention = self._program.layer(self._layer).attention
        place = self._layer - self._program.first_layer
        mixed = attention.mixed(self._state, self._memory, place, self._first)
        self._state = self._state + attention.projected(mixed)
        self._mixed[self._layer] = mixed
        self._cost += attention.cost(self._program.shape, self._first, self._state.shape[0])

    def _score_units(self) -> tuple[F32, F32]:
        """Gate and up products of the layer that was reached, which its scores follow from."""
        if self._products is None:
            ffn = self._program.layer(self._layer).ffn
            self._products = ffn.products(self._state)
            self._scores[self._layer] = ffn.score(*self._products)
            self._cost += ffn.score_cost(self._state.shape[0])
        return self._products

    def _leave(self) -> None:
        """From behind attention of a layer to what enters the next."""
        ffn = self._program.layer(self._layer).ffn
        self._state = self._state + ffn.contribution(*self._score_units())
        self._cost += ffn.contribution_cost(self._state.shape[0])
        self._layer, self._products = self._layer + 1, None

    def _spent(self) -> Cost:
        """What was done since this was last asked."""
        cost, self._cost = self._cost, NO_COST
        return cost


def _bias(file: TensorFile, name: str, size: int) -> F32:
    given = file.optional(name, (size,))
    return np.zeros(size, np.float32) if given is None else given
