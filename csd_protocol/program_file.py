"""The program format: how a predictor travels from the host that fits it to the drive that runs it.

A program file is a safetensors file whose metadata names the kind; the host writes it (`encode_*`),
the drive checks and runs it. `docs/PROGRAMS.md` has the tensors of each kind and what they mean.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from csd_protocol.low_bit import LowBitRows, low_bit_bytes, quantise_rows
from csd_protocol.packed import Role

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
Arrays = dict[str, npt.NDArray[Any]]

PROGRAM_VERSION = "1"
ACTIVATIONS = ("silu",)
ROLES = (Role.FFN, Role.HEADS, Role.ROUTER)  # sites that a program may speak for
WINDOW_TOKENS_MAX = 32
CONTEXT_MAX = 1 << 17


class ProgramKind(StrEnum):
    FREQUENCY = "frequency"
    WINDOW = "window"
    LOWRANK = "lowrank"
    MLP = "mlp"
    SVD = "svd"
    SHADOW = "shadow"
    ROLLOUT = "rollout"
    FARSIGHT = "farsight"
    GATE = "gate"
    ORACLE = "oracle"


class Key(StrEnum):
    """Names in a program file's metadata; every value is text, as safetensors has it."""

    KIND = "csd.program"
    VERSION = "csd.version"
    MODEL = "csd.model"  # the packed model that it was fitted to; it runs for no other
    ROLE = "csd.role"  # sites that it speaks for: "ffn", as without this key, "heads" or "router"
    BITS = "csd.bits"  # low-bit rows: 2, 3, 4 or 8
    GROUP = "csd.group"  # low-bit rows: values that share a scale
    ACTIVATION = "csd.activation"  # of a gated FFN: "silu"
    RMS_EPS = "csd.rms_eps"  # epsilon of every RMSNorm of the program
    TOKENS = "csd.tokens"  # window: how many observations back
    DECAY = "csd.decay"  # window: what one observation further back counts
    HEADS = "csd.heads"  # attention: query heads
    KV_HEADS = "csd.kv_heads"  # attention: key and value heads
    HEAD_DIM = "csd.head_dim"  # attention: values of one head
    ROPE_THETA = "csd.rope_theta"  # attention: base of the rotary embedding
    CONTEXT = "csd.context"  # attention: positions whose keys and values are kept


class Tensor(StrEnum):
    """Tensor names; a layer's own carries the layer's number: `gate.7`."""

    COUNTS = "counts"  # float32 [units]
    NORM = "norm"  # float32 [hidden]
    DOWN_NORM = "down_norm"  # float32 [units]

    GATE = "gate"  # low-bit [units, hidden]
    UP = "up"  # low-bit [units, hidden]
    DOWN = "down"  # low-bit [units, hidden]
    CHANNEL_SCALE = "channel_scale"  # float32 [hidden]

    ATTN_NORM = "attn_norm"  # float32 [hidden]
    ATTN_CHANNEL_SCALE = "attn_channel_scale"  # float32 [hidden]
    Q = "q"  # low-bit [heads * head_dim, hidden]
    K = "k"  # low-bit [kv_heads * head_dim, hidden]
    V = "v"  # low-bit [kv_heads * head_dim, hidden]
    O = "o"  # low-bit [hidden, heads * head_dim]  # noqa: E741
    Q_BIAS = "q_bias"  # float32 [heads * head_dim]
    K_BIAS = "k_bias"  # float32 [kv_heads * head_dim]
    V_BIAS = "v_bias"  # float32 [kv_heads * head_dim]

    INNER = "inner"  # float16 [rank, hidden]
    INNER_BIAS = "inner_bias"  # float32 [rank]
    OUTER = "outer"  # float16 [units, rank]
    OUTER_BIAS = "outer_bias"  # float32 [units]

    GATE_INNER = "gate_inner"  # float16 [rank, hidden]
    GATE_OUTER = "gate_outer"  # float16 [units, rank]
    UP_INNER = "up_inner"  # float16 [rank, hidden]
    UP_OUTER = "up_outer"  # float16 [units, rank]

    ROUTER = "router"  # float16 [experts, hidden]

    INPUT_NORM = "input_norm"  # float32 [hidden]
    INPUT = "input"  # float16 [width, hidden]
    BLOCK_ATTN_NORM = "block_attn_norm"  # float32 [width]
    BLOCK_Q = "block_q"  # float16 [heads * head_dim, width]
    BLOCK_K = "block_k"  # float16 [kv_heads * head_dim, width]
    BLOCK_V = "block_v"  # float16 [kv_heads * head_dim, width]
    BLOCK_O = "block_o"  # float16 [width, heads * head_dim]
    BLOCK_FFN_NORM = "block_ffn_norm"  # float32 [width]
    BLOCK_GATE = "block_gate"  # float16 [inner, width]
    BLOCK_UP = "block_up"  # float16 [inner, width]
    BLOCK_DOWN = "block_down"  # float16 [width, inner]
    OUTPUT_NORM = "output_norm"  # float32 [width]
    HEAD = "head"  # float16 [units, width]
    HEAD_BIAS = "head_bias"  # float32 [units]

    def of(self, number: int) -> str:
        """The tensor of one layer, or of one block."""
        return f"{self.value}.{number}"

    def scale_of(self, number: int) -> str:
        """The scales of a low-bit tensor, float16 [rows, columns / group]."""
        return f"{self.value}_scale.{number}"


# ---- what a program is made of ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShadowLayer:
    """One FFN as a shadow program sees it.

    Rows as float32 are quantised when they are encoded, gate and up after each of their columns was
    multiplied by `channel_scale`; rows as LowBitRows are taken as they are.
    """

    norm: F32  # [hidden], weight of the RMSNorm before the FFN
    gate: F32 | LowBitRows  # [units, hidden]
    up: F32 | LowBitRows  # [units, hidden]
    down_norm: F32  # [units], L2 norm of each down column
    down: F32 | LowBitRows | None = None  # [units, hidden], down columns as rows
    channel_scale: F32 | None = None  # [hidden]; inputs of gate and up are divided by it


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention as a rollout program sees it; rows as in ShadowLayer."""

    norm: F32  # [hidden], weight of the RMSNorm before attention
    q: F32 | LowBitRows  # [heads * head_dim, hidden]
    k: F32 | LowBitRows  # [kv_heads * head_dim, hidden]
    v: F32 | LowBitRows  # [kv_heads * head_dim, hidden]
    o: F32 | LowBitRows  # [hidden, heads * head_dim]
    q_bias: F32 | None = None
    k_bias: F32 | None = None
    v_bias: F32 | None = None
    channel_scale: F32 | None = None  # [hidden]; inputs of q, k and v are divided by it


@dataclass(frozen=True, slots=True)
class RolloutLayer:
    """One decoder layer; its FFN must have `down`."""

    attention: AttentionLayer
    ffn: ShadowLayer


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What attention's tensors do not say."""

    heads: int
    kv_heads: int
    head_dim: int  # even
    rope_theta: float
    context: int  # positions kept; older ones are forgotten


@dataclass(frozen=True, slots=True)
class TwoLayers:
    """Two linear layers over the normed hidden state; `mlp` has a ReLU between them."""

    norm: F32  # [hidden]
    inner: npt.NDArray[Any]  # [rank, hidden]
    outer: npt.NDArray[Any]  # [units, rank]
    inner_bias: F32 | None = None  # [rank]
    outer_bias: F32 | None = None  # [units]


@dataclass(frozen=True, slots=True)
class SvdLayer:
    """One FFN with gate and up as products of thin matrices."""

    norm: F32  # [hidden]
    gate_inner: npt.NDArray[Any]  # [rank, hidden]
    gate_outer: npt.NDArray[Any]  # [units, rank]
    up_inner: npt.NDArray[Any]  # [rank, hidden]
    up_outer: npt.NDArray[Any]  # [units, rank]
    down_norm: F32  # [units]


@dataclass(frozen=True, slots=True)
class GateLayer:
    """The router of one mixture of experts."""

    norm: F32  # [hidden], weight of the RMSNorm before the router
    router: npt.NDArray[Any]  # [experts, hidden]


@dataclass(frozen=True, slots=True)
class FarsightBlock:
    """One block of the small transformer: attention, then a gated FFN, each behind an RMSNorm."""

    attn_norm: F32  # [width]
    q: npt.NDArray[Any]  # [heads * head_dim, width]
    k: npt.NDArray[Any]  # [kv_heads * head_dim, width]
    v: npt.NDArray[Any]  # [kv_heads * head_dim, width]
    o: npt.NDArray[Any]  # [width, heads * head_dim]
    ffn_norm: F32  # [width]
    gate: npt.NDArray[Any]  # [inner, width]
    up: npt.NDArray[Any]  # [inner, width]
    down: npt.NDArray[Any]  # [width, inner]


@dataclass(frozen=True, slots=True)
class FarsightHead:
    """What one layer's units are scored with."""

    weight: npt.NDArray[Any]  # [units, width]
    bias: F32 | None = None  # [units]


@dataclass(frozen=True, slots=True)
class FarsightBody:
    """The small transformer without its heads."""

    input_norm: F32  # [hidden]
    input: npt.NDArray[Any]  # [width, hidden]
    blocks: tuple[FarsightBlock, ...]
    output_norm: F32  # [width]


# ---- writers ------------------------------------------------------------------------------------


def encode_frequency(
    model: str, counts: Mapping[int, npt.NDArray[Any]], *, role: Role = Role.FFN
) -> bytes:
    """A `frequency` program file from each layer's counts [units]."""
    tensors = {Tensor.COUNTS.of(layer): _single(values) for layer, values in counts.items()}
    return save(tensors, _metadata(ProgramKind.FREQUENCY, model, role))


def encode_window(
    model: str,
    counts: Mapping[int, npt.NDArray[Any]],
    *,
    tokens: int,
    decay: float,
    role: Role = Role.FFN,
) -> bytes:
    """A `window` program file; `counts` [units] are added to what the window gives.

    Raises ValueError for more than WINDOW_TOKENS_MAX tokens or a decay that is not in (0, 1].
    """
    if not 1 <= tokens <= WINDOW_TOKENS_MAX:
        raise ValueError(f"a window of {tokens} tokens; 1 to {WINDOW_TOKENS_MAX} are kept")
    if not 0 < decay <= 1:
        raise ValueError(f"a decay of {decay}; it lies above 0 and is at most 1")
    tensors = {Tensor.COUNTS.of(layer): _single(values) for layer, values in counts.items()}
    window = {Key.TOKENS.value: str(tokens), Key.DECAY.value: repr(float(decay))}
    return save(tensors, _metadata(ProgramKind.WINDOW, model, role) | window)


def encode_lowrank(
    model: str, layers: Mapping[int, TwoLayers], *, rms_eps: float, role: Role = Role.FFN
) -> bytes:
    """A `lowrank` program file: two linear layers and nothing between them."""
    return _encode_two_layers(ProgramKind.LOWRANK, model, layers, rms_eps, role)


def encode_mlp(
    model: str, layers: Mapping[int, TwoLayers], *, rms_eps: float, role: Role = Role.FFN
) -> bytes:
    """An `mlp` program file: two linear layers with a ReLU between them."""
    return _encode_two_layers(ProgramKind.MLP, model, layers, rms_eps, role)


def encode_svd(
    model: str, layers: Mapping[int, SvdLayer], *, rms_eps: float, activation: str = "silu"
) -> bytes:
    """An `svd` program file."""
    tensors: Arrays = {}
    for layer, weights in layers.items():
        tensors |= {
            Tensor.NORM.of(layer): _single(weights.norm),
            Tensor.GATE_INNER.of(layer): _half(weights.gate_inner),
            Tensor.GATE_OUTER.of(layer): _half(weights.gate_outer),
            Tensor.UP_INNER.of(layer): _half(weights.up_inner),
            Tensor.UP_OUTER.of(layer): _half(weights.up_outer),
            Tensor.DOWN_NORM.of(layer): _single(weights.down_norm),
        }
    svd = {Key.RMS_EPS.value: repr(float(rms_eps)), Key.ACTIVATION.value: activation}
    return save(tensors, _metadata(ProgramKind.SVD, model) | svd)


def encode_shadow(
    model: str,
    layers: Mapping[int, ShadowLayer],
    *,
    bits: int,
    group: int,
    rms_eps: float,
    activation: str = "silu",
) -> bytes:
    """A `shadow` program file. Raises ValueError as `quantise_rows` does."""
    tensors: Arrays = {}
    for layer, weights in layers.items():
        tensors |= _shadow_tensors(layer, weights, bits, group)
    shadow = _low_bit_metadata(bits, group, rms_eps, activation)
    return save(tensors, _metadata(ProgramKind.SHADOW, model) | shadow)


def encode_rollout(
    model: str,
    layers: Mapping[int, RolloutLayer],
    shape: AttentionShape,
    *,
    bits: int,
    group: int,
    rms_eps: float,
    activation: str = "silu",
) -> bytes:
    """A `rollout` program file of consecutive layers. Raises ValueError as `quantise_rows` does."""
    tensors: Arrays = {}
    for layer, weights in layers.items():
        if weights.ffn.down is None:
            raise ValueError(f"layer {layer}: a rollout needs the rows of down")
        tensors |= _shadow_tensors(layer, weights.ffn, bits, group)
        tensors |= _attention_tensors(layer, weights.attention, bits, group)
    rollout = _low_bit_metadata(bits, group, rms_eps, activation) | _shape_metadata(shape)
    return save(tensors, _metadata(ProgramKind.ROLLOUT, model) | rollout)


def encode_farsight(
    model: str,
    body: FarsightBody,
    heads: Mapping[int, FarsightHead],
    shape: AttentionShape,
    *,
    rms_eps: float,
    role: Role = Role.FFN,
) -> bytes:
    """A `farsight` program file: a small transformer and a head for each layer."""
    tensors: Arrays = {
        Tensor.INPUT_NORM.value: _single(body.input_norm),
        Tensor.INPUT.value: _half(body.input),
        Tensor.OUTPUT_NORM.value: _single(body.output_norm),
    }
    for number, block in enumerate(body.blocks):
        tensors |= _block_tensors(number, block)
    for layer, head in heads.items():
        tensors[Tensor.HEAD.of(layer)] = _half(head.weight)
        tensors |= _given({Tensor.HEAD_BIAS.of(layer): head.bias})
    farsight = {
        Key.RMS_EPS.value: repr(float(rms_eps)),
        Key.ACTIVATION.value: ACTIVATIONS[0],
    } | _shape_metadata(shape)
    return save(tensors, _metadata(ProgramKind.FARSIGHT, model, role) | farsight)


def encode_gate(model: str, layers: Mapping[int, GateLayer], *, rms_eps: float) -> bytes:
    """A `gate` program file; its units are experts."""
    tensors: Arrays = {}
    for layer, weights in layers.items():
        tensors[Tensor.NORM.of(layer)] = _single(weights.norm)
        tensors[Tensor.ROUTER.of(layer)] = _half(weights.router)
    gate = {Key.RMS_EPS.value: repr(float(rms_eps))}
    return save(tensors, _metadata(ProgramKind.GATE, model, Role.ROUTER) | gate)


def encode_oracle(
    model: str, down_norms: Mapping[int, npt.NDArray[Any]], *, role: Role = Role.FFN
) -> bytes:
    """An `oracle` program file: what each true activity [units] is multiplied by."""
    tensors = {Tensor.DOWN_NORM.of(layer): _single(norm) for layer, norm in down_norms.items()}
    return save(tensors, _metadata(ProgramKind.ORACLE, model, role))


def role_of(data: bytes) -> Role:
    """The role that a program file names."""
    header_bytes = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
    return Role(metadata.get(Key.ROLE, Role.FFN))


def shadow_layer_bytes(hidden: int, units: int, bits: int, group: int) -> int:
    """On-drive DRAM that one layer of a shadow program takes, without `down`."""
    return 2 * low_bit_bytes(units, hidden, bits, group) + 4 * hidden + 4 * units


def _encode_two_layers(
    kind: ProgramKind, model: str, layers: Mapping[int, TwoLayers], rms_eps: float, role: Role
) -> bytes:
    tensors: Arrays = {}
    for layer, weights in layers.items():
        tensors |= {
            Tensor.NORM.of(layer): _single(weights.norm),
            Tensor.INNER.of(layer): _half(weights.inner),
            Tensor.OUTER.of(layer): _half(weights.outer),
        }
        biases = {Tensor.INNER_BIAS: weights.inner_bias, Tensor.OUTER_BIAS: weights.outer_bias}
        tensors |= _given({name.of(layer): bias for name, bias in biases.items()})
    return save(tensors, _metadata(kind, model, role) | {Key.RMS_EPS.value: repr(float(rms_eps))})


def _shadow_tensors(layer: int, weights: ShadowLayer, bits: int, group: int) -> Arrays:
    scale = weights.channel_scale
    tensors: Arrays = {
        Tensor.NORM.of(layer): _single(weights.norm),
        Tensor.DOWN_NORM.of(layer): _single(weights.down_norm),
    }
    tensors |= _low_bit_tensors(Tensor.GATE, layer, weights.gate, bits, group, scale)
    tensors |= _low_bit_tensors(Tensor.UP, layer, weights.up, bits, group, scale)
    if weights.down is not None:
        tensors |= _low_bit_tensors(Tensor.DOWN, layer, weights.down, bits, group)
    return tensors | _given({Tensor.CHANNEL_SCALE.of(layer): scale})


def _attention_tensors(layer: int, weights: AttentionLayer, bits: int, group: int) -> Arrays:
    scale = weights.channel_scale
    tensors: Arrays = {Tensor.ATTN_NORM.of(layer): _single(weights.norm)}
    scaled = {Tensor.Q: weights.q, Tensor.K: weights.k, Tensor.V: weights.v}
    for name, rows in scaled.items():
        tensors |= _low_bit_tensors(name, layer, rows, bits, group, scale)
    tensors |= _low_bit_tensors(Tensor.O, layer, weights.o, bits, group)
    biases = {
        Tensor.Q_BIAS: weights.q_bias,
        Tensor.K_BIAS: weights.k_bias,
        Tensor.V_BIAS: weights.v_bias,
        Tensor.ATTN_CHANNEL_SCALE: scale,
    }
    return tensors | _given({name.of(layer): values for name, values in biases.items()})


def _block_tensors(number: int, block: FarsightBlock) -> Arrays:
    matrices = {
        Tensor.BLOCK_Q: block.q,
        Tensor.BLOCK_K: block.k,
        Tensor.BLOCK_V: block.v,
        Tensor.BLOCK_O: block.o,
        Tensor.BLOCK_GATE: block.gate,
        Tensor.BLOCK_UP: block.up,
        Tensor.BLOCK_DOWN: block.down,
    }
    tensors: Arrays = {name.of(number): _half(values) for name, values in matrices.items()}
    tensors[Tensor.BLOCK_ATTN_NORM.of(number)] = _single(block.attn_norm)
    tensors[Tensor.BLOCK_FFN_NORM.of(number)] = _single(block.ffn_norm)
    return tensors


def _low_bit_tensors(
    name: Tensor,
    layer: int,
    rows: F32 | LowBitRows,
    bits: int,
    group: int,
    channel_scale: F32 | None = None,
) -> Arrays:
    if not isinstance(rows, LowBitRows):
        scaled = rows if channel_scale is None else rows * channel_scale
        rows = LowBitRows(*quantise_rows(scaled, bits, group))
    return {name.of(layer): rows.packed, name.scale_of(layer): rows.scales}


def _given(tensors: Mapping[str, F32 | None]) -> Arrays:
    """Those of the optional tensors that there are."""
    return {name: _single(values) for name, values in tensors.items() if values is not None}


def _single(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(values, np.float32)


def _half(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(values, np.float16)


def _low_bit_metadata(bits: int, group: int, rms_eps: float, activation: str) -> dict[str, str]:
    return {
        Key.BITS.value: str(bits),
        Key.GROUP.value: str(group),
        Key.RMS_EPS.value: repr(float(rms_eps)),
        Key.ACTIVATION.value: activation,
    }


def _shape_metadata(shape: AttentionShape) -> dict[str, str]:
    return {
        Key.HEADS.value: str(shape.heads),
        Key.KV_HEADS.value: str(shape.kv_heads),
        Key.HEAD_DIM.value: str(shape.head_dim),
        Key.ROPE_THETA.value: repr(float(shape.rope_theta)),
        Key.CONTEXT.value: str(shape.context),
    }


def _metadata(kind: ProgramKind, model: str, role: Role = Role.FFN) -> dict[str, str]:
    return {
        Key.KIND.value: kind.value,
        Key.VERSION.value: PROGRAM_VERSION,
        Key.MODEL.value: model,
        Key.ROLE.value: role.value,
    }
