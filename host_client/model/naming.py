"""Where checkpoints lay the same weights down in other ways than their family's table says.

The table of a family (`families`) has one name for each tensor: that of the checkpoints that most
people have. Newer releases of transformers fuse what used to be apart, and llama.cpp stacks it.
Rows are side by side in all of them, so each tensor of the table is a run of rows of what is
stored, and nothing has to be read to say which.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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


# ---- Mixtral ---------------------------------------------------------------------------------


def _router(match: re.Match[str], shape: tuple[int, ...], config: dict[str, Any]) -> Iterator[Part]:
    yield f"{match[1]}.block_sparse_moe.gate.weight", 0, shape[0]


def _gate_up(
    match: re.Match[str], shape: tuple[int, ...], config: dict[str, Any]
) -> Iterator[Part]:
    """[experts, 2 * ffn, hidden]: of each expert gate, then up."""
    experts, both, _ = shape
    for expert in range(experts):
        name = f"{match[1]}.block_sparse_moe.experts.{expert}"
        yield f"{name}.w1.weight", expert * both, both // 2
        yield f"{name}.w3.weight", expert * both + both // 2, both // 2


def _stacked(
    match: re.Match[str], shape: tuple[int, ...], config: dict[str, Any]
) -> Iterator[Part]:
    """[experts, rows, columns]"""
    experts, rows, _ = shape
    which = {"mlp.experts.down_proj": "w2"}.get(match[2], match[2][-2:])
    for expert in range(experts):
        name = f"{match[1]}.block_sparse_moe.experts.{expert}.{which}.weight"
        yield name, expert * rows, rows


_LAYER = r"(model\.layers\.\d+)"
_RULES: dict[str, tuple[_Rule, ...]] = {
    "mixtral": (
        _Rule(re.compile(rf"{_LAYER}\.mlp\.gate\.weight"), _router),
        _Rule(re.compile(rf"{_LAYER}\.mlp\.experts\.gate_up_proj"), _gate_up),
        _Rule(re.compile(rf"{_LAYER}\.(mlp\.experts\.down_proj)"), _stacked),
        _Rule(re.compile(rf"{_LAYER}\.(block_sparse_moe\.experts\.w[123])\.weight"), _stacked),
    ),
}
