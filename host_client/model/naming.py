"""Where checkpoints lay the same weights down in other ways than their family's table says.

The table of a family (`families`) has one name for each tensor: that of the checkpoints that most
people have. Newer releases of transformers fuse what used to be apart, and llama.cpp stacks it.
Rows are side by side in all of them, so each tensor of the table is a run of rows of what is
stored, and nothing has to be read to say which.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from host_client.model.checkpoint import StoredTensor

Part = tuple[str, int, int]  # the table's name, first row, rows
Parts = Callable[[re.Match[str], tuple[int, ...], dict[str, Any]], Iterator[Part]]


@dataclass(frozen=True, slots=True)
class _Rule:
    """A stored tensor's name, and from match, shape and config the tensors that it holds."""

    pattern: re.Pattern[str]
    parts: Parts


def by_table(
    tensors: Mapping[str, StoredTensor], config: dict[str, Any]
) -> dict[str, StoredTensor]:
    """These tensors under the names of their family's table; those without a rule as they are."""
    rules = _RULES.get(str(config.get("model_type")), ())
    named: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        for rule in rules:
            match = rule.pattern.fullmatch(name)
            if match is not None:
                parts = rule.parts(match, tensor.shape, config)
                named |= {part: tensor.part(part, *rows) for part, *rows in parts}
                break
        else:
            named[name] = tensor
    return named


# ---- what tensors hold -----------------------------------------------------------------------


def _whole(name: str) -> Parts:
    """The same under another name, in which \\1 stands for the layer."""

    def parts(
        match: re.Match[str], shape: tuple[int, ...], config: dict[str, Any]
    ) -> Iterator[Part]:
        yield match.expand(name), 0, prod(shape[:-1]) if len(shape) > 1 else shape[0]

    return parts


def _halves(first: str, second: str) -> Parts:
    """Two of as many rows."""

    def parts(
        match: re.Match[str], shape: tuple[int, ...], config: dict[str, Any]
    ) -> Iterator[Part]:
        rows = shape[0] // 2
        yield match.expand(first), 0, rows
        yield match.expand(second), rows, rows

    return parts


def _attention(kv_heads: str) -> Parts:
    """Queries, keys and values one behind the other; `kv_heads` is a field of the config."""

    def parts(
        match: re.Match[str], shape: tuple[int, ...], config: dict[str, Any]
    ) -> Iterator[Part]:
        heads, groups = config["num_attention_heads"], config[kv_heads]
        head_rows = shape[0] // (heads + 2 * groups)
        start = 0
        for name, count in (("q", heads), ("k", groups), ("v", groups)):
            rows = count * head_rows
            yield f"model.layers.{match[1]}.self_attn.{name}_proj.{match[2]}", start, rows
            start += rows

    return parts


def _experts_gate_up(
    match: re.Match[str], shape: tuple[int, ...], config: dict[str, Any]
) -> Iterator[Part]:
    """[experts, 2 * ffn, hidden]: of each expert gate, then up."""
    experts, both, _ = shape
    for expert in range(experts):
        name = f"model.layers.{match[1]}.block_sparse_moe.experts.{expert}"
        yield f"{name}.w1.weight", expert * both, both // 2
        yield f"{name}.w3.weight", expert * both + both // 2, both // 2


def _stacked(which: str) -> Parts:
    """[experts, rows, columns]"""

    def parts(
        match: re.Match[str], shape: tuple[int, ...], config: dict[str, Any]
    ) -> Iterator[Part]:
        experts, rows, _ = shape
        for expert in range(experts):
            name = f"model.layers.{match[1]}.block_sparse_moe.experts.{expert}"
            yield f"{name}.{which}.weight", expert * rows, rows

    return parts


# ---- the rules, by the config's own `model_type` -----------------------------------------------


def _rules(rules: dict[str, Parts]) -> tuple[_Rule, ...]:
    """Names with N for a layer's number, {a|b} for any of these."""
    return tuple(_Rule(re.compile(_pattern(name)), parts) for name, parts in rules.items())


def _pattern(name: str) -> str:
    escaped = re.escape(name).replace(r"\.N\.", r"\.(\d+)\.")
    return re.sub(r"\\\{(.*?)\\\}", lambda choice: f"({choice[1].replace(chr(92), '')})", escaped)


_LAYER = "model.layers.\\1"
_GATE, _UP = rf"{_LAYER}.mlp.gate_proj.weight", rf"{_LAYER}.mlp.up_proj.weight"
_RULES: dict[str, tuple[_Rule, ...]] = {
    "mixtral": _rules(
        {
            "model.layers.N.mlp.gate.weight": _whole(rf"{_LAYER}.block_sparse_moe.gate.weight"),
            "model.layers.N.mlp.experts.gate_up_proj": _experts_gate_up,
            "model.layers.N.mlp.experts.down_proj": _stacked("w2"),
            "model.layers.N.block_sparse_moe.experts.w1.weight": _stacked("w1"),
            "model.layers.N.block_sparse_moe.experts.w2.weight": _stacked("w2"),
            "model.layers.N.block_sparse_moe.experts.w3.weight": _stacked("w3"),
        }
    ),
    "glm": _rules({"model.layers.N.mlp.gate_up_proj.weight": _halves(_GATE, _UP)}),
    "chatglm": _rules(
        {
            "transformer.embedding.word_embeddings.weight": _whole("model.embed_tokens.weight"),
            "transformer.encoder.final_layernorm.weight": _whole("model.norm.weight"),
            "transformer.output_layer.weight": _whole("lm_head.weight"),
            **{
                f"transformer.encoder.layers.N.{theirs}": parts
                for theirs, parts in {
                    "input_layernorm.weight": _whole(rf"{_LAYER}.input_layernorm.weight"),
                    "post_attention_layernorm.weight": _whole(
                        rf"{_LAYER}.post_attention_layernorm.weight"
                    ),
                    "self_attention.query_key_value.{weight|bias}": _attention(
                        "multi_query_group_num"
                    ),
                    "self_attention.dense.weight": _whole(rf"{_LAYER}.self_attn.o_proj.weight"),
                    "mlp.dense_h_to_4h.weight": _halves(_GATE, _UP),
                    "mlp.dense_4h_to_h.weight": _whole(rf"{_LAYER}.mlp.down_proj.weight"),
                }.items()
            },
        }
    ),
    "qwen": _rules(
        {
            "transformer.wte.weight": _whole("model.embed_tokens.weight"),
            "transformer.ln_f.weight": _whole("model.norm.weight"),
            **{
                f"transformer.h.N.{theirs}": parts
                for theirs, parts in {
                    "ln_1.weight": _whole(rf"{_LAYER}.input_layernorm.weight"),
                    "ln_2.weight": _whole(rf"{_LAYER}.post_attention_layernorm.weight"),
                    "attn.c_attn.{weight|bias}": _attention("num_attention_heads"),
                    "attn.c_proj.weight": _whole(rf"{_LAYER}.self_attn.o_proj.weight"),
                    "mlp.w1.weight": _whole(_UP),  # silu is on the other one
                    "mlp.w2.weight": _whole(_GATE),
                    "mlp.c_proj.weight": _whole(rf"{_LAYER}.mlp.down_proj.weight"),
                }.items()
            },
        }
    ),
}
