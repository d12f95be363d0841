"""Families of models as tables: which tensors make up the units of each site.

A unit is a stack of *pieces*, each so many rows of one tensor, or so many of its columns taken as
rows. All pieces of a site have rows of the same length, so that one unit is one array [rows, cols]
and one read. A new family is a new table.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from csd_protocol.packed import Bits, Part, Role, UnitKind, row_bytes
from host_client.model.checkpoint import Checkpoint
from host_client.model.errors import (
    InvalidConfig,
    MissingTensor,
    ShapeMismatch,
    UnknownFamily,
    UnsupportedModel,
)

_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one tensor gives to each unit of a site."""

    tensor: str  # Hugging Face's name
    shape: tuple[int, ...]
    rows_per_unit: int
    columns: bool = False  # columns of the tensor, laid down as rows


@dataclass(frozen=True, slots=True)
class SiteShape:
    """A site before it has a place: `count` units, each the `pieces` stacked, `width` values wide.

    `rows` x `cols` is what the manifest says of a unit; it holds as many values as the stack.
    """

    role: Role
    kind: UnitKind
    layer: int
    count: int
    rows: int
    cols: int
    width: int
    pieces: tuple[Piece, ...]
    parts: tuple[Part, ...] = ()
    expert: int = -1  # whose FFN this is, in a mixture
    bits: Bits = 16

    @property
    def stack_rows(self) -> int:
        return sum(piece.rows_per_unit for piece in self.pieces)

    @property
    def unit_bytes(self) -> int:
        return self.rows * row_bytes(self.cols, self.bits)


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The sizes that a LLaMA config states, with its defaults filled in."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def group_rows(self) -> int:
        """Query rows of one KV group."""
        return self.heads // self.kv_heads * self.head_dim

    @property
    def unit_bytes(self) -> int:
        """An FFN unit at 16 bits: its gate row, up row and down column."""
        return 3 * self.hidden * 2

    @property
    def group_bytes(self) -> int:
        """A KV group at 16 bits: its query rows and output columns."""
        return 2 * self.group_rows * self.hidden * 2


@dataclass(frozen=True, slots=True)
class Family:
    """A `model_type`: checks its config, and says what its sites are, in the order of the drive."""

    check: Callable[[dict[str, Any]], None]
    sites: Callable[[dict[str, Any]], Iterator[SiteShape]]


def family_sites(checkpoint: Checkpoint) -> tuple[SiteShape, ...]:
    """The sites of a checkpoint, with every tensor found and of the right shape.

    Raises UnknownFamily, InvalidConfig, UnsupportedModel, MissingTensor or ShapeMismatch.
    """
    family = find_family(checkpoint.config, checkpoint.source)
    family.check(checkpoint.config)
    sites = tuple(family.sites(checkpoint.config))
    _check_tensors(checkpoint, sites)
    return sites


def find_family(config: dict[str, Any], source: str) -> Family:
    """The table for a config's `model_type`. Raises UnknownFamily naming the known ones."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UnknownFamily(
            f"{source} is of the family {model_type!r}; known are: {', '.join(FAMILIES)}. "
            "Choose a model of one of these"
        )
    return FAMILIES[model_type]


def _check_tensors(checkpoint: Checkpoint, sites: tuple[SiteShape, ...]) -> None:
    names = set(checkpoint.names())
    for site in sites:
        for piece in site.pieces:
            if piece.tensor not in names:
                raise MissingTensor(
                    f"{checkpoint.source} has no tensor {piece.tensor}, which its config calls "
                    "for. Download or convert the model again"
                )
            shape = checkpoint.shape(piece.tensor)
            if shape != piece.shape:
                raise ShapeMismatch(
                    f"{checkpoint.source}: tensor {piece.tensor} is {shape}, but the config "
                    f"says {piece.shape}. Config and weights are not of the same model"
                )


# ---- what decoders have in common ------------------------------------------------------------


def llama_shape(config: dict[str, Any]) -> LlamaShape:
    """Raises InvalidConfig naming the field that is missing or does not fit the others."""
    for key in _REQUIRED:
        if not isinstance(config.get(key), int) or config[key] <= 0:
            raise InvalidConfig(f"config: {key} is {config.get(key)!r}, not a positive number")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise InvalidConfig(f"config: {heads} heads cannot share {kv_heads} key-value heads")
    return LlamaShape(
        hidden=config["hidden_size"],
        ffn=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _check_decoder(config: dict[str, Any], *refused: str) -> None:
    """Raises UnsupportedModel for options that the units have no place for."""
    for key in refused:
        if config.get(key):
            raise UnsupportedModel(
                f"config: {key} is set; models of the family {config['model_type']} with such "
                "biases do not pack"
            )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModel(f"config: hidden_act is {activation!r}; only silu is supported")
    if config.get("quantization_config"):
        raise UnsupportedModel(
            "config: the weights are quantised (quantization_config). "
            "Use the 16-bit checkpoint, or a GGUF file"
        )


Vectors = dict[str, tuple[str, int]]  # part -> tensor behind a layer's prefix, values
VectorsOf = Callable[[dict[str, Any], LlamaShape], Vectors]
FfnsOf = Callable[[int, dict[str, Any], LlamaShape], Iterator[SiteShape]]


def _layer_norms(config: dict[str, Any], shape: LlamaShape) -> Vectors:
    return {
        "input_norm": ("input_layernorm.weight", shape.hidden),
        "post_attention_norm": ("post_attention_layernorm.weight", shape.hidden),
    }


def _with_biases(config: dict[str, Any], shape: LlamaShape) -> Vectors:
    """And biases of query, key and value."""
    keys = shape.kv_heads * shape.head_dim
    return _layer_norms(config, shape) | {
        "q_bias": ("self_attn.q_proj.bias", shape.heads * shape.head_dim),
        "k_bias": ("self_attn.k_proj.bias", keys),
        "v_bias": ("self_attn.v_proj.bias", keys),
    }


def _with_biases_if_set(config: dict[str, Any], shape: LlamaShape) -> Vectors:
    if config.get("attention_bias", True):
        return _with_biases(config, shape)
    return _layer_norms(config, shape)


def _with_head_norms(config: dict[str, Any], shape: LlamaShape) -> Vectors:
    """And norms of each head's query and key."""
    return _layer_norms(config, shape) | {
        "q_norm": ("self_attn.q_norm.weight", shape.head_dim),
        "k_norm": ("self_attn.k_norm.weight", shape.head_dim),
    }


def _one_ffn(layer: int, config: dict[str, Any], shape: LlamaShape) -> Iterator[SiteShape]:
    gate, up, down = (f"model.layers.{layer}.mlp.{name}_proj" for name in ("gate", "up", "down"))
    yield _ffn(layer, gate, up, down, shape)


def _decoder(
    config: dict[str, Any], vectors: VectorsOf = _layer_norms, ffns: FfnsOf = _one_ffn
) -> Iterator[SiteShape]:
    """The embedding, each layer's norms, kv, heads and ffn, the last norm, the output head."""
    shape = llama_shape(config)
    yield _rows(Role.EMBED, "model.embed_tokens.weight", shape)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield _vectors(Role.NORMS, layer, f"{prefix}.", vectors(config, shape))
        yield _kv(layer, f"{prefix}.self_attn", shape)
        yield _heads(layer, f"{prefix}.self_attn", shape)
        yield from ffns(layer, config, shape)
    yield _vectors(Role.FINAL_NORM, -1, "", {"norm": ("model.norm.weight", shape.hidden)})
    if not shape.tied:
        yield _rows(Role.LM_HEAD, "lm_head.weight", shape)


def _rows(role: Role, tensor: str, shape: LlamaShape) -> SiteShape:
    piece = Piece(tensor, (shape.vocabulary, shape.hidden), 1)
    width = shape.hidden
    return SiteShape(role, UnitKind.ROW, -1, shape.vocabulary, 1, width, width, (piece,))


def _vectors(role: Role, layer: int, prefix: str, vectors: Vectors) -> SiteShape:
    """Norms and biases, one behind the other."""
    pieces = tuple(Piece(prefix + tensor, (size,), size) for tensor, size in vectors.values())
    parts = tuple(Part(name=name, shape=(size,)) for name, (_, size) in vectors.items())
    cols = sum(size for _, size in vectors.values())
    return SiteShape(role, UnitKind.TENSOR, layer, 1, 1, cols, 1, pieces, parts)


def _kv(layer: int, prefix: str, shape: LlamaShape) -> SiteShape:
    rows, width = shape.kv_heads * shape.head_dim, shape.hidden
    names = ("k_proj", "v_proj")
    pieces = tuple(Piece(f"{prefix}.{name}.weight", (rows, width), rows) for name in names)
    parts = tuple(Part(name=name, shape=(rows, width)) for name in names)
    return SiteShape(Role.KV, UnitKind.TENSOR, layer, 1, 2 * rows, width, width, pieces, parts)


def _heads(layer: int, prefix: str, shape: LlamaShape) -> SiteShape:
    rows, width = shape.group_rows, shape.hidden
    all_rows = shape.heads * shape.head_dim
    query = Piece(f"{prefix}.q_proj.weight", (all_rows, width), rows)
    output = Piece(f"{prefix}.o_proj.weight", (width, all_rows), rows, columns=True)
    count, pieces = shape.kv_heads, (query, output)
    return SiteShape(Role.HEADS, UnitKind.HEAD, layer, count, 2 * rows, width, width, pieces)


def _ffn(
    layer: int, gate: str, up: str, down: str, shape: LlamaShape, expert: int = -1
) -> SiteShape:
    """`gate`, `up` and `down` are names of linear layers."""
    count, width = shape.ffn, shape.hidden
    pieces = (
        Piece(f"{gate}.weight", (count, width), 1),
        Piece(f"{up}.weight", (count, width), 1),
        Piece(f"{down}.weight", (width, count), 1, columns=True),
    )
    kind = UnitKind.NEURON
    return SiteShape(Role.FFN, kind, layer, count, 3, width, width, pieces, expert=expert)


# ---- mixtures --------------------------------------------------------------------------------


def _expert_count(config: dict[str, Any]) -> int:
    """Raises InvalidConfig unless a token's experts are as many as there are, or fewer."""
    experts, used = config.get("num_local_experts"), config.get("num_experts_per_tok")
    if not isinstance(experts, int) or not isinstance(used, int) or not 1 <= used <= experts:
        raise InvalidConfig(
            f"config: num_experts_per_tok is {used!r} of num_local_experts {experts!r}; "
            "a token's experts are one at least, and not more than there are"
        )
    return experts


def _experts(layer: int, config: dict[str, Any], shape: LlamaShape) -> Iterator[SiteShape]:
    """A router, and an FFN for each expert."""
    experts, block = _expert_count(config), f"model.layers.{layer}.block_sparse_moe"
    router = Piece(f"{block}.gate.weight", (experts, shape.hidden), 1)
    width = shape.hidden
    yield SiteShape(Role.ROUTER, UnitKind.ROW, layer, experts, 1, width, width, (router,))
    for expert in range(experts):
        names = f"{block}.experts.{expert}"
        yield _ffn(layer, f"{names}.w1", f"{names}.w3", f"{names}.w2", shape, expert)


# ---- the table -------------------------------------------------------------------------------


def _family(
    *refused: str,
    vectors: VectorsOf = _layer_norms,
    ffns: FfnsOf = _one_ffn,
    **defaults: Any,
) -> Family:
    """A decoder. `defaults` are of config fields, where transformers has others than LLaMA's."""

    def check(config: dict[str, Any]) -> None:
        _check_decoder(defaults | config, *refused)

    def sites(config: dict[str, Any]) -> Iterator[SiteShape]:
        return _decoder(defaults | config, vectors, ffns)

    return Family(check, sites)


FAMILIES = {
    "llama": _family("attention_bias", "mlp_bias"),
    "qwen2": _family(vectors=_with_biases),
    "qwen3": _family("attention_bias", vectors=_with_head_norms, head_dim=128),
    "glm": _family(vectors=_with_biases_if_set, head_dim=128, num_key_value_heads=2),
    "mixtral": _family(ffns=_experts),
}
