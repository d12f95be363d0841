"""A KV cache with room for the plan's context from the start: tokens are written, nothing grows.

transformers' own cache makes each layer's keys and values anew for every token, which copies all of
them and leaves holes in the heap. Beam search and the like, which put other tensors in their place,
work as they do there.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, float32 [texts, heads, tokens, width], in memory of its own.

    tokens_max: of all texts together.
    """

    def __init__(self, tokens_max: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tokens_max = tokens_max
        self._key_store: torch.Tensor | None = None
        self._value_store: torch.Tensor | None = None

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: object,
        **keywords: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds [texts, heads, new tokens, width] and returns all there is, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        self._key_store = self._with_room(self._key_store, self.keys, key_states, end)
        self._value_store = self._with_room(self._value_store, self.values, value_states, end)
        self._key_store[:, :, begin:end] = key_states
        self._value_store[:, :, begin:end] = value_states
        self.keys = self._key_store[:, :, :end]
        self.values = self._value_store[:, :, :end]
        return self.keys, self.values

    def _with_room(
        self, store: torch.Tensor | None, held: torch.Tensor, new: torch.Tensor, end: int
    ) -> torch.Tensor:
        """The store of what is held, with room for `end` tokens of each text."""
        texts, heads, _, width = new.shape
        if (
            store is not None
            and texts == store.shape[0]
            and end <= store.shape[2]
            and (not held.numel() or held.data_ptr() == store.data_ptr())
        ):
            return store
        made = new.new_empty(texts, heads, max(end, self._tokens_max // texts), width)
        if held.numel():
            made[:, :, : held.shape[2]] = held
        return made


def preallocate(cache: Cache, tokens_max: int) -> None:
    """Makes a cache of growing layers one with room, while it is empty; others stay as they are."""
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[number] = PreallocatedLayer(tokens_max)
