"""A model's layers as plain matrices, one layer at a time, for measuring and for building programs.

Neither the drive nor transformers' modules take part: whole windows of text go through a layer in
one go, so thousands of tokens are measured in minutes. Layers are read from the checkpoint when
they are asked for, so memory holds a few of them whatever the size of the model.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from host_client.model.checkpoint import Checkpoint
from host_client.model.errors import UnsupportedModel
from host_client.model.families import LlamaShape, find_family, llama_shape


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One decoder layer. Matrices [outputs, inputs]; `down` [units, hidden]: columns as rows."""

    number: int
    attn_norm: torch.Tensor  # [hidden]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    norm: torch.Tensor  # [hidden], of the FFN
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    down_norm: torch.Tensor  # [units], of the float32 rows

    def cast(self, dtype: torch.dtype) -> "DecoderLayer":
        """The same with its matrices as `dtype`; vectors stay float32."""
        matrices = {
            field.name: getattr(self, field.name).to(dtype)
            for field in fields(self)
            if field.name in ("q", "k", "v", "o", "gate", "up", "down")
        }
        return replace(self, **matrices)


def knows(config: dict[str, Any]) -> bool:
    """Whether a `DenseModel` has the arithmetic of this model."""
    return config.get("model_type") == "llama"


def _check_known(checkpoint: Checkpoint) -> None:
    if not knows(checkpoint.config):
        raise UnsupportedModel(
            f"{checkpoint.source} is of the family {checkpoint.config.get('model_type')}: what "
            "measures text and fits programs layer by layer knows dense LLaMA models only. "
            "`csd pack` counts neurons in passes of its own, and `csd predictor build` makes "
            "shadow and frequency, and gate for a mixture of experts"
        )


class DenseModel:
    """A LLaMA checkpoint: its layers, and the arithmetic of one.

    Weights are rounded to 16 bits as they are when the model is packed, so that units near a
    threshold fall as they do on a drive.
    `dtype`: of the factors of matrix products; sums, norms and the residual stream are float32.
    `device`: where weights and states are.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises UnknownFamily, InvalidConfig or UnsupportedModel."""
        find_family(checkpoint.config, checkpoint.source).check(checkpoint.config)
        _check_known(checkpoint)
        self._checkpoint = checkpoint
        self._packed_dtype = getattr(torch, checkpoint.dtype)
        self.dtype, self.device = dtype, torch.device(device)
        self.shape: LlamaShape = llama_shape(checkpoint.config)
        self.rms_eps = float(checkpoint.config.get("rms_norm_eps", 1e-6))
        settings = dict(checkpoint.config)
        self._config: Any = AutoConfig.for_model(settings.pop("model_type"), **settings)
        self._final_norm = self._read("model.norm.weight")
        self._embedding = self._read("model.embed_tokens.weight").to(dtype)
        head = self._embedding
        if not self.shape.tied:
            head = self._read("lm_head.weight").to(dtype)
        self._head = head

    @property
    def parameters(self) -> int:
        """Of the whole checkpoint."""
        checkpoint = self._checkpoint
        return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())

    @property
    def rope_theta(self) -> float:
        return float(self._config.rope_parameters["rope_theta"])

    @property
    def positions_max(self) -> int:
        """Tokens of the longest text that the model was made for."""
        return int(self._config.max_position_embeddings)

    @property
    def rope_is_plain(self) -> bool:
        """Whether positions are rotated by theta alone, with no scaling."""
        return bool(self._config.rope_parameters.get("rope_type", "default") == "default")

    def layer(self, number: int) -> DecoderLayer:
        """A layer's weights, float32, read now."""
        prefix = f"model.layers.{number}"
        attention, ffn = f"{prefix}.self_attn", f"{prefix}.mlp"
        down = self._read(f"{ffn}.down_proj.weight").t().contiguous()
        return DecoderLayer(
            number=number,
            attn_norm=self._read(f"{prefix}.input_layernorm.weight"),
            q=self._read(f"{attention}.q_proj.weight"),
            k=self._read(f"{attention}.k_proj.weight"),
            v=self._read(f"{attention}.v_proj.weight"),
            o=self._read(f"{attention}.o_proj.weight"),
            norm=self._read(f"{prefix}.post_attention_layernorm.weight"),
            gate=self._read(f"{ffn}.gate_proj.weight"),
            up=self._read(f"{ffn}.up_proj.weight"),
            down=down,
            down_norm=down.norm(dim=1),
        )

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [windows, tokens] -> float32 [windows, tokens, hidden]."""
        rows: torch.Tensor = self._embedding[ids.to(self.device)]
        return rows.float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final hidden states [..., hidden] -> float32 [..., vocabulary]."""
        return self._product(self.normed(hidden, self._final_norm), self._head)

    def normed(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm over the last dimension."""
        return rms_norm(hidden, weight, self.rms_eps)

    def ffn_input(self, layer: DecoderLayer, attended: torch.Tensor) -> torch.Tensor:
        """The hidden state behind attention, as the FFN sees it."""
        return self.normed(attended, layer.norm)

    def activity(self, layer: DecoderLayer, x: torch.Tensor) -> torch.Tensor:
        """silu(gate x) * (up x): [..., hidden] -> float32 [..., units]."""
        gate = self._product(x, layer.gate)
        return F.silu(gate, inplace=True).mul_(self._product(x, layer.up))

    def summed(self, layer: DecoderLayer, activity: torch.Tensor) -> torch.Tensor:
        """What units of this activity add to the residual stream: [..., units] -> [..., hidden]."""
        return (activity.to(self.dtype) @ layer.down.to(self.dtype)).float()

    def attention(self, layer: DecoderLayer, hidden: torch.Tensor) -> torch.Tensor:
        """Causal attention over whole windows; hidden float32 [windows, tokens, hidden]."""
        return self.projected(layer, self.mixed(layer, hidden))

    def projected(self, layer: DecoderLayer, mixed: torch.Tensor) -> torch.Tensor:
        """The heads' values behind the output projection: [..., hidden]."""
        return self._product(mixed, layer.o)

    def group_outputs(self, layer: DecoderLayer, mixed: torch.Tensor) -> torch.Tensor:
        """What each KV group adds to the residual stream: [..., groups, hidden].

        mixed: what `mixed` returned; the groups' sum is what `attention` returns.
        """
        by_group = mixed.unflatten(-1, (self.shape.kv_heads, -1)).unbind(-2)
        columns = layer.o.unflatten(1, (self.shape.kv_heads, -1)).unbind(1)
        pairs = zip(by_group, columns, strict=True)
        return torch.stack([self._product(*pair) for pair in pairs], -2)

    def mixed(
        self, layer: DecoderLayer, hidden: torch.Tensor, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The heads' values before the output projection: [windows, tokens, heads * head_dim].

        kept: the states whose keys and values earlier tokens left, if they are others.
        """
        cosines, sines = self._rotation(hidden.shape[1])
        x = self.normed(hidden, layer.attn_norm)
        queries = rotated(self._by_head(self._product(x, layer.q)), cosines, sines)
        keys, values = self._keys_values(layer, x)
        if kept is None or kept is hidden:
            mixed = F.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, enable_gqa=True
            )
        else:
            earlier = self._keys_values(layer, self.normed(kept, layer.attn_norm))
            mixed = _attend_apart(queries, keys, values, *earlier)
        return mixed.transpose(1, 2).flatten(2)

    def _keys_values(
        self, layer: DecoderLayer, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys, and values, [windows, kv_heads, tokens, head_dim]."""
        keys, values = (self._by_head(self._product(x, rows)) for rows in (layer.k, layer.v))
        return rotated(keys, *self._rotation(x.shape[1])), values

    def _rotation(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        embedding: Any = LlamaRotaryEmbedding(config=self._config)
        cosines, sines = embedding(torch.empty(1), torch.arange(tokens)[None])
        return cosines[0].to(self.device), sines[0].to(self.device)

    def _by_head(self, rows: torch.Tensor) -> torch.Tensor:
        heads: torch.Tensor = rows.unflatten(2, (-1, self.shape.head_dim))
        return heads.transpose(1, 2)

    def _product(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.dtype), rows.to(self.dtype)).float()

    def _read(self, name: str) -> torch.Tensor:
        rows = self._checkpoint.read_rows(name, 0, self._checkpoint.shape(name)[0])
        return rows.to(self.device, self._packed_dtype).float()


def best_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, rms_eps: float) -> torch.Tensor:
    """hidden [..., width] over its root mean square, times weight [width]."""
    mean = hidden.pow(2).mean(-1, keepdim=True)
    return hidden * torch.rsqrt(mean + rms_eps) * weight


def rotated(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [..., tokens, head_dim]: a head's halves against each other."""
    first, second = x.chunk(2, dim=-1)
    turned: torch.Tensor = x * cosines + torch.cat([-second, first], dim=-1) * sines
    return turned


def _attend_apart(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    earlier_keys: torch.Tensor,
    earlier_values: torch.Tensor,
) -> torch.Tensor:
    """Causal attention to a token's own key and value and to others' of earlier tokens.

    All [windows, heads or kv_heads, tokens, head_dim].
    """
    shared = queries.shape[1] // keys.shape[1]
    keys, values, earlier_keys, earlier_values = (
        rows.repeat_interleave(shared, dim=1)
        for rows in (keys, values, earlier_keys, earlier_values)
    )
    products = queries @ earlier_keys.transpose(2, 3)
    products.diagonal(dim1=2, dim2=3).copy_((queries * keys).sum(-1))
    later = torch.ones_like(products[0, 0], dtype=torch.bool).triu(1)
    products.div_(queries.shape[-1] ** 0.5).masked_fill_(later, -torch.inf)
    weights = products.softmax(-1)
    own = weights.diagonal(dim1=2, dim2=3)[..., None] * values
    weights.diagonal(dim1=2, dim2=3).zero_()
    return weights @ earlier_values + own
