"""What a model's layers see and do on text, while it runs at exact quality off its drive.

For every family that runs: nothing here knows a layer's arithmetic. A program is then judged by
what the model itself wanted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from host_client.runtime.causal_lm import runtime_of
from host_client.runtime.layers import StagedFfn
from host_client.runtime.staged_experts import StagedExperts

F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]


@dataclass(slots=True)
class Seen:
    """One pass over a window of text: by layer, and by what programs call an FFN's layer."""

    entered: list[F32] = field(default_factory=list)  # [tokens, hidden], states that enter
    attended: list[F32] = field(default_factory=list)  # the same behind attention
    experts: list[I64] = field(default_factory=list)  # [tokens, chosen]; empty: no mixture
    activities: dict[int, F32] = field(default_factory=dict)  # [its tokens, units]

    def tokens_of(self, layer: int, expert: int) -> I64:
        """The tokens, ascending, that an FFN computed: its rows in `activities`."""
        if expert < 0:
            return np.arange(self.entered[layer].shape[0])
        return np.flatnonzero((self.experts[layer] == expert).any(axis=1))


class Watcher:
    """Sees passes of `model`, which runs at exact quality."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        packed = runtime_of(model).packed
        self._units = {packed.program_layer(site): site.count for site in packed.ffns()}
        self._seen = Seen()

    def watch(self, window: torch.Tensor) -> Seen:
        """One pass over int64 [1, tokens]."""
        self._seen = Seen()
        with self._hooked(), torch.inference_mode():
            self._model(window, use_cache=False, logits_to_keep=1)
        return self._seen

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        body: Any = self._model.model
        watched = [module for module in body.modules() if isinstance(module, _OBSERVED)]
        hooks = []
        for layer in body.layers:
            hooks.append(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
            hooks.append(layer.post_attention_layernorm.register_forward_pre_hook(self._attend))
        for module in watched:
            module.observer = self._observe
            if isinstance(module, StagedExperts):
                hooks.append(module.register_forward_pre_hook(self._route))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in watched:
                module.observer = None

    def _enter(self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._seen.entered.append(_rows(arguments[0] if arguments else keywords["hidden_states"]))

    def _attend(self, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._seen.attended.append(_rows(arguments[0]))

    def _route(self, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._seen.experts.append(arguments[1].numpy().astype(np.int64))

    def _observe(self, layer: int, units: U32, activity: F32) -> None:
        """Part of an FFN; the parts of a pass together cover its units once."""
        shape = (activity.shape[0], self._units[layer])
        whole = self._seen.activities.setdefault(layer, np.empty(shape, np.float32))
        whole[:, units] = activity


_OBSERVED = (StagedFfn, StagedExperts)


def _rows(hidden: torch.Tensor) -> F32:
    """[1, tokens, hidden] -> [tokens, hidden], a copy."""
    rows: F32 = hidden.detach().reshape(-1, hidden.shape[-1]).float().numpy().copy()
    return rows
