"""Attach an engine to a transformers model: the one file that touches its parts.

The model is built from its config on torch's meta device, so no weight is ever allocated; then its
embedding, projections, FFNs and output head are replaced by `layers`, and its norms filled with the
packed values; caches are given their room. Everything else (rotary embedding, attention,
`generate`) stays transformers' own. The names of the replaced modules are the same in every family
that `ATTACHABLE` lists.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from csd_protocol.packed import PackedModel, Role, Site
from host_client.runtime import kernels
from host_client.runtime.biased import Biased
from host_client.runtime.engine import Engine
from host_client.runtime.kv_cache import preallocate
from host_client.runtime.layers import (
    Projection,
    StagedEmbedding,
    StagedFfn,
    StagedHead,
    StagedProjection,
)
from host_client.runtime.memory_limit import prompt_chunk_tokens
from host_client.runtime.notes import Place
from host_client.runtime.staged_experts import StagedExperts

ATTACHABLE = ("llama", "qwen2", "qwen3", "glm", "mixtral")
_BIASES = {Projection.QUERY: "q_bias", Projection.KEY: "k_bias", Projection.VALUE: "v_bias"}


def config_of(packed: PackedModel) -> PretrainedConfig:
    """The transformers config that the model was packed with."""
    settings = dict(packed.config)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def skeleton(packed: PackedModel) -> PreTrainedModel:
    """A transformers model without any weights, in evaluation mode."""
    if packed.family not in ATTACHABLE:
        raise ValueError(f"family {packed.family!r} cannot run; known: {', '.join(ATTACHABLE)}")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config_of(packed), dtype=torch.float32, attn_implementation="sdpa"
        )
    made: PreTrainedModel = model.eval()
    return made


def attach(model: PreTrainedModel, engine: Engine) -> None:
    """Replace what holds weights in `model` by modules that compute on the engine's units."""
    body: Any = model.model
    body.embed_tokens = StagedEmbedding(engine)
    for number, layer in enumerate(body.layers):
        _attach_layer(layer, number, engine)
    norm = engine.model.find(Role.FINAL_NORM)
    body.norm.weight = _parameter(_parts(engine, norm)["norm"])
    body.rotary_emb = type(body.rotary_emb)(config=model.config)  # its tables, off the meta device
    head: Any = StagedHead(engine)
    model.lm_head = head
    generation: Any = model.generation_config
    generation.prefill_chunk_size = prompt_chunk_tokens(model.config.hidden_size)
    _check_complete(model)


def _attach_layer(layer: Any, number: int, engine: Engine) -> None:
    vectors = _parts(engine, engine.model.find(Role.NORMS, number))
    for projection in Projection:
        staged: nn.Module = StagedProjection(engine, number, projection)
        bias = vectors.get(_BIASES.get(projection, ""))
        staged = staged if bias is None else Biased(staged, bias)
        setattr(layer.self_attn, projection.value, staged)
    for name in ("q_norm", "k_norm"):
        if name in vectors:
            getattr(layer.self_attn, name).weight = _parameter(vectors[name])
    if engine.experts is None:
        layer.mlp = StagedFfn(engine, number)
    else:
        router = engine.resident[engine.model.find(Role.ROUTER, number).site]
        weight = np.empty((router.site.count, router.site.cols), np.float32)
        kernels.widen_rows(router.values, None, weight, engine.encoding(router.site))
        layer.mlp.gate.weight = _parameter(torch.from_numpy(weight))
        layer.mlp.experts = StagedExperts(engine, engine.experts, number)
    layer.input_layernorm.weight = _parameter(vectors["input_norm"])
    layer.post_attention_layernorm.weight = _parameter(vectors["post_attention_norm"])
    layer.register_forward_pre_hook(_entry_hook(number, engine), with_kwargs=True)
    layer.post_attention_layernorm.register_forward_pre_hook(_attended_hook(number, engine))


def _entry_hook(number: int, engine: Engine) -> Any:
    def enter(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hidden: torch.Tensor = arguments[0] if arguments else keywords["hidden_states"]
        if number == 0:
            place = _place(hidden, keywords)
            engine.locate(place)
            if isinstance(place.cache, Cache):
                preallocate(place.cache, engine.plan.context)
        engine.enter(number, _rows(hidden))

    return enter


def _place(hidden: torch.Tensor, keywords: dict[str, Any]) -> Place:
    """Where a pass over hidden [texts, rows, hidden] stands, as transformers tells its layers.

    Padding lies before the first token, and the last row's position counts tokens only.
    """
    texts, rows = hidden.shape[:2]
    cache = keywords.get("past_key_values")
    cached = int(cache.get_seq_length()) if cache is not None else 0
    first = int(keywords["position_ids"][0, -1]) + 1 - rows
    padding = max(0, -first) if texts == 1 else 0
    return Place(
        cache=cache,
        position=max(0, first),
        tokens=rows - padding,
        texts=texts,
        padding=padding,
        cached_tokens=texts * (cached + rows),
    )


def _attended_hook(number: int, engine: Engine) -> Any:
    def attended(norm: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        engine.attended(number, _rows(arguments[0]))

    return attended


def _rows(hidden: torch.Tensor) -> npt.NDArray[np.float32]:
    """[batch, tokens, hidden] -> [rows, hidden]."""
    rows: npt.NDArray[np.float32] = hidden.detach().reshape(-1, hidden.shape[-1]).numpy()
    return rows


def _parts(engine: Engine, site: Site) -> dict[str, torch.Tensor]:
    """The tensors inside a resident `tensor` unit, as float32."""
    flat = np.empty((1, site.rows * site.cols), np.float32)
    kernels.widen_rows(engine.resident[site.site].values, None, flat, engine.encoding(site))
    parts, start = {}, 0
    for part in site.parts:
        size = int(np.prod(part.shape))
        parts[part.name] = torch.from_numpy(flat[0, start : start + size].reshape(part.shape))
        start += size
    return parts


def _parameter(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _check_complete(model: PreTrainedModel) -> None:
    """Nothing may be left without a value."""
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    left += [name for name, tensor in model.named_buffers() if tensor.is_meta]
    assert not left, f"the family's table misses {', '.join(left)}"
