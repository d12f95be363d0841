"""One small program of each kind for one small model, and what each must score, in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from csd_protocol import packed as pk
from csd_protocol.crc32c import crc32c_units
from csd_protocol.low_bit import dequantise_rows, quantise_rows
from csd_protocol.program_file import (
    AttentionLayer,
    AttentionShape,
    FarsightBlock,
    FarsightBody,
    FarsightHead,
    GateLayer,
    RolloutLayer,
    ShadowLayer,
    SvdLayer,
    TwoLayers,
    encode_farsight,
    encode_frequency,
    encode_gate,
    encode_lowrank,
    encode_mlp,
    encode_oracle,
    encode_rollout,
    encode_shadow,
    encode_svd,
    encode_window,
)

MODEL = "m"
LAYERS, HIDDEN, UNITS, GROUP, RANK, RMS_EPS = 3, 32, 48, 16, 6, 1e-5
WIDTH, INNER, BLOCKS = 16, 24, 2
SHAPE = AttentionShape(heads=4, kv_heads=2, head_dim=8, rope_theta=1e4, context=6)
SIGHT_SHAPE = AttentionShape(heads=2, kv_heads=1, head_dim=8, rope_theta=1e4, context=6)
DECAY, TOKENS = 0.5, 3

Reference = Callable[[int, np.ndarray], np.ndarray]  # (layer, hidden [rows, hidden]) -> [units]


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def positive(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 1.5, size).astype(np.float32)


def halved(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float64)


def rms_norm(hidden: np.ndarray, norm: np.ndarray) -> np.ndarray:
    wide = hidden.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + RMS_EPS) * norm


def silu(values: np.ndarray) -> np.ndarray:
    return values / (1 + np.exp(-values))


# ---- weights ----------------------------------------------------------------------------------


def shadow_layer(layer: int, scaled: bool = True) -> ShadowLayer:
    seed = 100 * layer
    return ShadowLayer(
        norm=positive(seed, HIDDEN),
        gate=random(seed + 1, UNITS, HIDDEN) * 0.3,
        up=random(seed + 2, UNITS, HIDDEN) * 0.3,
        down_norm=positive(seed + 3, UNITS),
        down=random(seed + 4, UNITS, HIDDEN) * 0.1,
        channel_scale=positive(seed + 5, HIDDEN) if scaled else None,
    )


def attention_layer(layer: int) -> AttentionLayer:
    seed = 100 * layer + 50
    queries, kept = SHAPE.heads * SHAPE.head_dim, SHAPE.kv_heads * SHAPE.head_dim
    return AttentionLayer(
        norm=positive(seed, HIDDEN),
        q=random(seed + 1, queries, HIDDEN) * 0.3,
        k=random(seed + 2, kept, HIDDEN) * 0.3,
        v=random(seed + 3, kept, HIDDEN) * 0.3,
        o=random(seed + 4, HIDDEN, queries) * 0.3,
        k_bias=random(seed + 5, kept),
        channel_scale=positive(seed + 6, HIDDEN),
    )


def two_layers(layer: int) -> TwoLayers:
    seed = 100 * layer + 10
    return TwoLayers(
        norm=positive(seed, HIDDEN),
        inner=random(seed + 1, RANK, HIDDEN),
        outer=random(seed + 2, UNITS, RANK),
        inner_bias=random(seed + 3, RANK),
        outer_bias=random(seed + 4, UNITS),
    )


def svd_layer(layer: int) -> SvdLayer:
    seed = 100 * layer + 20
    return SvdLayer(
        norm=positive(seed, HIDDEN),
        gate_inner=random(seed + 1, RANK, HIDDEN),
        gate_outer=random(seed + 2, UNITS, RANK),
        up_inner=random(seed + 3, RANK + 1, HIDDEN),
        up_outer=random(seed + 4, UNITS, RANK + 1),
        down_norm=positive(seed + 5, UNITS),
    )


def gate_layer(layer: int) -> GateLayer:
    seed = 100 * layer + 30
    return GateLayer(positive(seed, HIDDEN), random(seed + 1, UNITS, HIDDEN))


def farsight_body() -> FarsightBody:
    queries = SIGHT_SHAPE.heads * SIGHT_SHAPE.head_dim
    kept = SIGHT_SHAPE.kv_heads * SIGHT_SHAPE.head_dim

    def block(number: int) -> FarsightBlock:
        seed = 1000 + 100 * number
        return FarsightBlock(
            attn_norm=positive(seed, WIDTH),
            q=random(seed + 1, queries, WIDTH),
            k=random(seed + 2, kept, WIDTH),
            v=random(seed + 3, kept, WIDTH),
            o=random(seed + 4, WIDTH, queries),
            ffn_norm=positive(seed + 5, WIDTH),
            gate=random(seed + 6, INNER, WIDTH),
            up=random(seed + 7, INNER, WIDTH),
            down=random(seed + 8, WIDTH, INNER),
        )

    return FarsightBody(
        input_norm=positive(2000, HIDDEN),
        input=random(2001, WIDTH, HIDDEN),
        blocks=tuple(block(number) for number in range(BLOCKS)),
        output_norm=positive(2002, WIDTH),
    )


def farsight_head(layer: int) -> FarsightHead:
    bias = random(3100 + layer, UNITS) if layer else None
    return FarsightHead(random(3000 + layer, UNITS, WIDTH), bias)


def counts(layer: int) -> np.ndarray:
    return positive(500 + layer, UNITS)


# ---- files ------------------------------------------------------------------------------------


def shadow_file(bits: int = 4, model: str = MODEL, scaled: bool = True) -> bytes:
    layers = {layer: shadow_layer(layer, scaled) for layer in range(LAYERS)}
    return encode_shadow(model, layers, bits=bits, group=GROUP, rms_eps=RMS_EPS)


def rollout_file(bits: int = 4, model: str = MODEL) -> bytes:
    layers = {n: RolloutLayer(attention_layer(n), shadow_layer(n)) for n in range(LAYERS)}
    return encode_rollout(model, layers, SHAPE, bits=bits, group=GROUP, rms_eps=RMS_EPS)


def farsight_file(model: str = MODEL) -> bytes:
    heads = {layer: farsight_head(layer) for layer in range(LAYERS)}
    return encode_farsight(model, farsight_body(), heads, SIGHT_SHAPE, rms_eps=RMS_EPS)


def each(make):
    return {layer: make(layer) for layer in range(LAYERS)}


@dataclass(frozen=True)
class Sample:
    """A program file and how wide its input is."""

    encode: Callable[[str], bytes]  # by the model's name
    width: int = HIDDEN


SAMPLES: dict[str, Sample] = {
    "frequency": Sample(lambda model: encode_frequency(model, each(counts))),
    "window": Sample(lambda model: encode_window(model, each(counts), tokens=TOKENS, decay=DECAY)),
    "lowrank": Sample(lambda model: encode_lowrank(model, each(two_layers), rms_eps=RMS_EPS)),
    "mlp": Sample(lambda model: encode_mlp(model, each(two_layers), rms_eps=RMS_EPS)),
    "svd": Sample(lambda model: encode_svd(model, each(svd_layer), rms_eps=RMS_EPS)),
    "shadow": Sample(lambda model: shadow_file(4, model)),
    "shadow-2": Sample(lambda model: shadow_file(2, model)),
    "shadow-3": Sample(lambda model: shadow_file(3, model)),
    "shadow-8": Sample(lambda model: shadow_file(8, model)),
    "rollout": Sample(lambda model: rollout_file(4, model)),
    "farsight": Sample(farsight_file),
    "gate": Sample(lambda model: encode_gate(model, each(gate_layer), rms_eps=RMS_EPS)),
    "oracle": Sample(
        lambda model: encode_oracle(model, {n: positive(n, UNITS) for n in range(LAYERS)}),
        width=UNITS,
    ),
}
BITS = {"shadow": 4, "shadow-2": 2, "shadow-3": 3, "shadow-8": 8, "rollout": 4}


# ---- references -------------------------------------------------------------------------------


class FfnReference:
    """One FFN of low-bit values, in float64."""

    def __init__(self, layer: int, bits: int, scaled: bool = True) -> None:
        weights = shadow_layer(layer, scaled)
        scale = np.ones(HIDDEN) if weights.channel_scale is None else weights.channel_scale
        self.norm, self.down_norm = weights.norm, weights.down_norm
        self.gate = low_bit(weights.gate, bits, scale) / scale
        self.up = low_bit(weights.up, bits, scale) / scale
        self.down = low_bit(weights.down, bits)

    def activities(self, inputs: np.ndarray) -> np.ndarray:
        return silu(inputs @ self.gate.T) * (inputs @ self.up.T)

    def scores(self, state: np.ndarray) -> np.ndarray:
        activities = np.abs(self.activities(rms_norm(state, self.norm)))
        return (activities * self.down_norm).max(axis=0)

    def after(self, state: np.ndarray) -> np.ndarray:
        return state + self.activities(rms_norm(state, self.norm)) @ self.down

    def correction(self, inputs: np.ndarray, computed: np.ndarray) -> np.ndarray:
        activities = self.activities(inputs.astype(np.float64))
        activities[:, computed] = 0
        return activities @ self.down


def low_bit(values: np.ndarray, bits: int, channel_scale: np.ndarray | None = None) -> np.ndarray:
    scaled = values if channel_scale is None else values * channel_scale.astype(np.float32)
    return dequantise_rows(*quantise_rows(scaled, bits, GROUP), bits).astype(np.float64)


def rotated(vectors: np.ndarray, positions: np.ndarray, shape: AttentionShape) -> np.ndarray:
    """Rotary embedding of vectors [rows, heads, head_dim], value by value."""
    half = shape.head_dim // 2
    turned = np.empty_like(vectors)
    for row, position in enumerate(positions):
        for value in range(half):
            angle = position * shape.rope_theta ** (-2 * value / shape.head_dim)
            low, high = vectors[row, :, value], vectors[row, :, value + half]
            turned[row, :, value] = low * np.cos(angle) - high * np.sin(angle)
            turned[row, :, value + half] = high * np.cos(angle) + low * np.sin(angle)
    return turned


class AttentionReference:
    """Keys and values of one layer by position, kept in a dict."""

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape
        self.kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def attend(self, first: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        shape, rows = self.shape, q.shape[0]
        positions = first + np.arange(rows)
        q = rotated(q.reshape(rows, shape.heads, -1), positions, shape)
        k = rotated(k.reshape(rows, shape.kv_heads, -1), positions, shape)
        v = v.reshape(rows, shape.kv_heads, -1)
        for row, position in enumerate(positions):
            self.kept.pop(position - shape.context, None)
            self.kept[int(position)] = (k[row], v[row])
        out = np.zeros((rows, shape.heads, shape.head_dim))
        for row, position in enumerate(positions):
            seen = [p for p in self.kept if position - shape.context < p <= position]
            for head in range(shape.heads):
                kv = head // (shape.heads // shape.kv_heads)
                keys = np.array([self.kept[p][0][kv] for p in seen])
                values = np.array([self.kept[p][1][kv] for p in seen])
                weights = np.exp(keys @ q[row, head] / np.sqrt(shape.head_dim))
                out[row, head] = weights / weights.sum() @ values
        return out.reshape(rows, -1)


class RolloutReference:
    """The rollout of a command whose states entered `layer`, or are behind its attention."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.attention = [AttentionReference(SHAPE) for _ in range(LAYERS)]
        self.group_norms: dict[int, np.ndarray] = {}  # by layer, of the last command

    def scores(
        self, layer: int, behind_attention: bool, first: int, state: np.ndarray
    ) -> dict[int, np.ndarray]:
        state, scores, self.group_norms = state.astype(np.float64), {}, {}
        for number in range(layer, LAYERS):
            if number > layer or not behind_attention:
                state = self._attend(number, first, state)
            ffn = FfnReference(number, self.bits)
            scores[number] = ffn.scores(state)
            state = ffn.after(state)
        return scores

    def remember(self, layer: int, first: int, state: np.ndarray) -> None:
        """Keys and values of states that entered a layer; what it had behind them is gone."""
        attention = self.attention[layer]
        attention.kept = {p: kept for p, kept in attention.kept.items() if p < first}
        early = max(0, state.shape[0] - SHAPE.context)
        projected = self._projected(layer, state[early:].astype(np.float64))
        attention.attend(first + early, *projected)

    def _attend(self, number: int, first: int, state: np.ndarray) -> np.ndarray:
        attended = self.attention[number].attend(first, *self._projected(number, state))
        o = low_bit(attention_layer(number).o, self.bits).T
        size = attended.shape[1] // SHAPE.kv_heads
        starts = range(0, attended.shape[1], size)
        added = [attended[:, at : at + size] @ o[at : at + size] for at in starts]
        self.group_norms[number] = np.linalg.norm(added, axis=2).max(axis=1)
        return state + sum(added)

    def _projected(self, number: int, state: np.ndarray) -> tuple[np.ndarray, ...]:
        weights = attention_layer(number)
        inputs = rms_norm(state, weights.norm) / weights.channel_scale
        q, k, v = (
            inputs @ low_bit(rows, self.bits, weights.channel_scale).T
            for rows in (weights.q, weights.k, weights.v)
        )
        return q, k + weights.k_bias, v


class FarsightReference:
    def __init__(self) -> None:
        self.attention = [AttentionReference(SIGHT_SHAPE) for _ in range(BLOCKS)]

    def scores(self, layer: int, first: int, hidden: np.ndarray) -> np.ndarray:
        body, head = farsight_body(), farsight_head(layer)
        state = rms_norm(hidden, body.input_norm) @ halved(body.input).T
        for block, attention in zip(body.blocks, self.attention, strict=True):
            inputs = rms_norm(state, block.attn_norm)
            q, k, v = (inputs @ halved(rows).T for rows in (block.q, block.k, block.v))
            state = state + attention.attend(first, q, k, v) @ halved(block.o).T
            inputs = rms_norm(state, block.ffn_norm)
            activities = silu(inputs @ halved(block.gate).T) * (inputs @ halved(block.up).T)
            state = state + activities @ halved(block.down).T
        scores = rms_norm(state, body.output_norm) @ halved(head.weight).T
        return (scores + (0 if head.bias is None else head.bias)).max(axis=0)


def two_layer_scores(layer: int, hidden: np.ndarray, relu: bool) -> np.ndarray:
    weights = two_layers(layer)
    inner = rms_norm(hidden, weights.norm) @ halved(weights.inner).T + weights.inner_bias
    inner = np.maximum(inner, 0) if relu else inner
    return (inner @ halved(weights.outer).T + weights.outer_bias).max(axis=0)


def svd_scores(layer: int, hidden: np.ndarray) -> np.ndarray:
    weights = svd_layer(layer)
    inputs = rms_norm(hidden, weights.norm)
    gate = inputs @ (halved(weights.gate_outer) @ halved(weights.gate_inner)).T
    up = inputs @ (halved(weights.up_outer) @ halved(weights.up_inner)).T
    return (np.abs(silu(gate) * up) * weights.down_norm).max(axis=0)


def gate_scores(layer: int, hidden: np.ndarray) -> np.ndarray:
    weights = gate_layer(layer)
    scores: np.ndarray = rms_norm(hidden, weights.norm) @ halved(weights.router).T
    return scores.max(axis=0)


REFERENCES: dict[str, Reference] = {
    "frequency": lambda layer, hidden: counts(layer),
    "window": lambda layer, hidden: counts(layer),
    "lowrank": lambda layer, hidden: two_layer_scores(layer, hidden, relu=False),
    "mlp": lambda layer, hidden: two_layer_scores(layer, hidden, relu=True),
    "svd": svd_scores,
    "farsight": lambda layer, hidden: FarsightReference().scores(layer, 0, hidden),
    "gate": gate_scores,
    "oracle": lambda layer, hidden: (np.abs(hidden) * positive(layer, UNITS)).max(axis=0),
    "rollout": lambda layer, hidden: RolloutReference(4).scores(0, False, 0, hidden)[layer],
} | {
    kind: lambda layer, hidden, bits=bits: FfnReference(layer, bits).scores(hidden)
    for kind, bits in BITS.items()
    if kind != "rollout"
}


# ---- the model ----------------------------------------------------------------------------------


def packed_image(name: str = MODEL, model: int = 1) -> bytes:
    """A drive's first bytes with one packed model: heads and FFN of each layer, all HIDDEN wide."""
    at = pk.MODELS_OFFSET_BYTES + 2 * pk.BLOCK_BYTES
    sites: list[pk.Site] = []
    pieces: list[tuple[int, bytes]] = []
    tables: list[bytes] = []
    shapes = (
        (pk.Role.HEADS, pk.UnitKind.HEAD, 4, 2),
        (pk.Role.FFN, pk.UnitKind.NEURON, UNITS, 3),
        (pk.Role.ROUTER, pk.UnitKind.ROW, UNITS, 1),
    )
    for layer in range(LAYERS):
        for role, kind, count, rows in shapes:
            first = sum(site.count for site in sites)
            site = pk.Site(
                site=len(sites), role=role, kind=kind, layer=layer, count=count, rows=rows,
                cols=HIDDEN, offset_bytes=at, first_crc=first,
            )  # fmt: skip
            rng = np.random.default_rng(len(sites))
            units = rng.integers(0, 256, (count, site.unit_bytes), np.uint8)
            pieces.append((at, units.tobytes()))
            tables.append(crc32c_units(units).astype("<u4").tobytes())
            sites.append(site)
            at = pk.align_up(at + site.length_bytes, pk.BLOCK_BYTES)
    table_at = pk.MODELS_OFFSET_BYTES + pk.BLOCK_BYTES
    table = pk.Extent(offset_bytes=table_at, length_bytes=sum(map(len, tables)))
    manifest = pk.encode_manifest(
        pk.PackedModel(
            name=name, family="llama", config={}, dtype="float16", source="test", fingerprint="f",
            sites=tuple(sites), crc_table=table, format_version=pk.EXTENDED_VERSION,
        )
    )  # fmt: skip
    assert len(manifest) <= pk.BLOCK_BYTES
    begin = pk.MODELS_OFFSET_BYTES
    entry = pk.DirectoryEntry(
        model=model,
        name=name,
        state="complete",
        fingerprint="f",
        extent=pk.Extent(offset_bytes=begin, length_bytes=at - begin),
        manifest=pk.Extent(offset_bytes=begin, length_bytes=len(manifest)),
        progress=pk.Extent(offset_bytes=begin, length_bytes=0),
    )
    directory = pk.encode_directory(pk.Directory(generation=0, models=(entry,)))
    pieces += [(0, directory), (begin, manifest), (table_at, b"".join(tables))]
    image = bytearray(at)
    for offset, piece in pieces:
        image[offset : offset + len(piece)] = piece
    return bytes(image)


def ffn_site(layer: int) -> int:
    return 3 * layer + 1


def site_of(kind: str, layer: int) -> int:
    """Which site a program of this kind speaks for, unless it says another."""
    return 3 * layer + 2 if kind == "gate" else ffn_site(layer)


def heads_site(layer: int) -> int:
    return 3 * layer
