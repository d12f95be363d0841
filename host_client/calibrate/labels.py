"""What each token of a text wants of each layer, and what is known of it how early.

A layer's labels are its top third of units, a bit each: what a trained program is to say. KV groups
are too few for yes or no: theirs are shares. The states are those that a program would be asked
with (`choosers`).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from host_client.calibrate.calibration import seen_state
from host_client.calibrate.dense_model import DecoderLayer, DenseModel
from host_client.calibrate.lab import WANTED_SHARE
from host_client.calibrate.selection import top

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_WINDOWS_AT_ONCE = 4
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Labels:
    """Which outputs each row wants, as many in every row: a bit each, for texts of any length."""

    bits: U8  # [rows, outputs / 8]
    outputs: int
    wanted: int  # of them, in every row

    @classmethod
    def of(cls, mask: torch.Tensor) -> "Labels":
        """mask: bool [..., outputs]; all but the last dimension become rows."""
        flat = mask.flatten(0, -2).cpu()
        return cls(np.packbits(flat.numpy(), axis=1), flat.shape[1], int(flat[0].sum()))

    def __len__(self) -> int:
        return len(self.bits)

    def shares(self) -> F32:
        """[outputs]: how often each is wanted."""
        counts = np.zeros(self.outputs, np.int64)
        for start in range(0, len(self), _ROWS_AT_ONCE):
            part = np.unpackbits(
                self.bits[start : start + _ROWS_AT_ONCE], axis=1, count=self.outputs
            )
            counts += part.sum(0, dtype=np.int64)
        return (counts / len(self)).astype(np.float32)

    def rows(self, which: slice | torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """float32 [rows, outputs] of some rows: 1 where wanted."""
        bits = self.bits[which if isinstance(which, slice) else which.numpy()]
        unpacked = np.unpackbits(bits, axis=1, count=self.outputs)
        return torch.from_numpy(unpacked).to(device).float()


@dataclass(frozen=True, slots=True)
class SoftLabels:
    """What share of a row's sum each output has, where outputs are few: used as `Labels` are."""

    values: torch.Tensor  # float32 [rows, outputs], on the CPU
    wanted: int  # outputs that a row's recall is judged by: half, rounded up

    @classmethod
    def of(cls, sizes: torch.Tensor) -> "SoftLabels":
        """sizes: [..., outputs], none negative; all but the last dimension become rows."""
        flat = sizes.flatten(0, -2).float().cpu()
        shares = flat / flat.sum(-1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
        return cls(shares, -(-flat.shape[1] // 2))

    def rows(self, which: slice | torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """float32 [rows, outputs] of some rows."""
        return self.values[which].to(device)


@dataclass(frozen=True, slots=True)
class LayerLabels:
    """One layer on a text."""

    layer: DecoderLayer  # float32
    seen: dict[int, torch.Tensor]  # by lookahead: states float32 [windows, tokens, hidden]
    wanted: Labels  # of all tokens, window after window


def label_layers(
    model: DenseModel,
    windows: torch.Tensor,
    lookaheads: Sequence[int] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[LayerLabels]:
    """Each layer in order. windows: int64 [windows, tokens]."""
    with torch.no_grad():
        hidden = model.embed(windows)
        known: deque[torch.Tensor] = deque(maxlen=max([1, *lookaheads]))
        for number in range(model.shape.layers):
            layer = model.layer(number)
            seen = {ahead: seen_state(known, hidden, ahead) for ahead in lookaheads}
            attended, left, wanted = _pass(model, layer.cast(model.dtype), hidden)
            yield LayerLabels(layer, seen, wanted)
            known.append(attended)
            hidden = left
            progress(number + 1, model.shape.layers)


def _pass(
    model: DenseModel, layer: DecoderLayer, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Labels]:
    """All windows through one layer: behind its attention, behind its FFN, and what it wanted."""
    third = max(1, round(WANTED_SHARE * len(layer.gate)))
    attended, left, masks = [], [], []
    for part in hidden.split(_WINDOWS_AT_ONCE):
        attended.append(part + model.attention(layer, part))
        activity = model.activity(layer, model.ffn_input(layer, attended[-1]))
        left.append(attended[-1] + model.summed(layer, activity))
        masks.append(top(activity.abs_().mul_(layer.down_norm), third))
    return torch.cat(attended), torch.cat(left), Labels.of(torch.cat(masks))
