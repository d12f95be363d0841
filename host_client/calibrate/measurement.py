"""What `csd calibrate` measures, in one walk of text through the dense model.

Of each layer: how often each unit is wanted, what the layer loses when it keeps fewer, in which
order its units should lie; and its *sensitivity*, the KL divergence of the whole model's output
when this layer alone keeps a third of its units. For that, a few windows go through the layers once
more for each layer: with that one masked and the others dense, all of them side by side.

The walk may be broken off: what later layers need is kept in a file after each of them.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from host_client.calibrate.calibration import UnitSums
from host_client.calibrate.dense_model import DecoderLayer, DenseModel
from host_client.calibrate.selection import top
from host_client.calibrate.unit_order import order_of
from host_client.model.calibration_record import Calibration

U32 = npt.NDArray[np.uint32]

PROBE_TOKENS = 512  # of the first windows: what sensitivity is measured on
_WINDOWS_AT_ONCE = 4
_LOGIT_ROWS = 512
_STATE_VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """counts: uint32 [layers, units], how many tokens had a unit in their top third."""

    counts: U32
    calibration: Calibration


@dataclass(slots=True, eq=False)
class _State:
    """A walk behind some of its layers; CPU tensors in the file, the model's device here.

    hidden: [windows, tokens, hidden]; masked: [layers, probe windows, tokens, hidden], one layer
    masked in each; counts, dropped, order: [layers, ...] as they are measured.
    """

    hidden: torch.Tensor
    masked: torch.Tensor
    counts: torch.Tensor
    dropped: torch.Tensor
    order: torch.Tensor

    @property
    def layers(self) -> int:
        return self.counts.shape[0]


@dataclass(frozen=True, slots=True)
class Bookmark:
    """The file that a walk of this text through this model goes on from."""

    path: Path
    fingerprint: str

    @classmethod
    def of(cls, folder: Path, name: str, fingerprint: str, windows: torch.Tensor) -> "Bookmark":
        """One file a model in `folder`, so an unfinished walk of other text gives way."""
        text = f"{_STATE_VERSION} {fingerprint} {tuple(windows.shape)}".encode()
        digest = hashlib.sha256(text + windows.numpy().tobytes()).hexdigest()
        named = hashlib.sha256(name.encode()).hexdigest()[:16]
        return cls(folder / f"{named}.safetensors", digest)

    def read(self) -> _State | None:
        """None where there is none of this walk, or none that can be read."""
        try:
            with safe_open(self.path, "pt") as file:
                if (file.metadata() or {}).get("fingerprint") != self.fingerprint:
                    return None
                return _State(*(file.get_tensor(field.name) for field in fields(_State)))
        except (OSError, SafetensorError):
            return None

    def write(self, state: _State) -> None:
        """Replaces what was there, all or nothing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {field.name: getattr(state, field.name).cpu() for field in fields(_State)}
        draft = self.path.with_suffix(".draft")
        save_file(tensors, draft, {"fingerprint": self.fingerprint})
        os.replace(draft, self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def measure(
    model: DenseModel,
    windows: torch.Tensor,
    progress: Callable[[int, int], None],
    bookmark: Bookmark | None = None,
) -> Measured:
    """windows: int64 [windows, tokens]. progress: layers done, layers in all."""
    with torch.inference_mode():
        state = _begin(model, windows, bookmark)
        probes = max(1, PROBE_TOKENS // windows.shape[1])
        progress(state.layers, model.shape.layers)
        while state.layers < model.shape.layers:
            _step(model, state, probes)
            if bookmark is not None:
                bookmark.write(state)
            progress(state.layers, model.shape.layers)
        return _finish(model, state, probes)


def _begin(model: DenseModel, windows: torch.Tensor, bookmark: Bookmark | None) -> _State:
    kept = None if bookmark is None else bookmark.read()
    if kept is not None:
        kept.hidden, kept.masked = kept.hidden.to(model.device), kept.masked.to(model.device)
        return kept
    units, hidden = model.shape.ffn, model.embed(windows)
    return _State(
        hidden=hidden,
        masked=hidden.new_empty((0, *hidden[: max(1, PROBE_TOKENS // windows.shape[1])].shape)),
        counts=torch.empty(0, units, dtype=torch.int64),
        dropped=torch.empty(0, units + 1),
        order=torch.empty(0, units, dtype=torch.int64),
    )


def _step(model: DenseModel, state: _State, probes: int) -> None:
    """All windows, and the masked ones, through the next layer."""
    layer = model.layer(state.layers).cast(model.dtype)
    sums = UnitSums(model.shape.ffn, model.device)
    masked = [_through(model, layer, run) for run in state.masked]
    masked.append(_through(model, layer, state.hidden[:probes], kept=sums.third))
    wanted, passed = [], []
    for part in state.hidden.split(_WINDOWS_AT_ONCE):
        attended, activity = _activity(model, layer, part)
        wanted.append(sums.add((activity.abs() * layer.down_norm).flatten(0, 1)).cpu())
        passed.append(attended + model.summed(layer, activity))
    order = order_of(torch.cat(wanted).numpy())
    state.hidden, state.masked = torch.cat(passed), torch.stack(masked)
    state.counts = _with_row(state.counts, sums.counts.astype(np.int64))
    state.dropped = _with_row(state.dropped, sums.dropped)
    state.order = _with_row(state.order, order.astype(np.int64))


def _with_row(rows: torch.Tensor, row: npt.NDArray[np.generic]) -> torch.Tensor:
    return torch.cat([rows, torch.from_numpy(row)[None]])


def _activity(
    model: DenseModel, layer: DecoderLayer, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state behind attention, and the FFN's activity."""
    attended = hidden + model.attention(layer, hidden)
    return attended, model.activity(layer, model.ffn_input(layer, attended))


def _through(
    model: DenseModel, layer: DecoderLayer, hidden: torch.Tensor, kept: int | None = None
) -> torch.Tensor:
    """The layer's output; of the best `kept` units alone, where that is given."""
    attended, activity = _activity(model, layer, hidden)
    if kept is not None:
        activity *= top(activity.abs() * layer.down_norm, kept)
    return attended + model.summed(layer, activity)


def _finish(model: DenseModel, state: _State, probes: int) -> Measured:
    dropped = state.dropped.numpy()
    third = UnitSums(model.shape.ffn, model.device).third
    sensitivity = _divergences(model, state.hidden[:probes], state.masked)
    lost = np.maximum(dropped[:, third], np.finfo(np.float32).tiny)
    calibration = Calibration(
        weights=(sensitivity / lost).astype(np.float32),
        dropped=dropped,
        order=state.order.numpy().astype(np.uint32),
    )
    return Measured(state.counts.numpy().astype(np.uint32), calibration)


def _divergences(
    model: DenseModel, dense: torch.Tensor, masked: torch.Tensor
) -> npt.NDArray[np.float64]:
    """KL(dense || masked), nats, mean over positions, of each run [layers]."""
    sums = torch.zeros(masked.shape[0], dtype=torch.float64)
    ends, others = dense.flatten(0, 1), masked.flatten(1, 2)
    for start in range(0, ends.shape[0], _LOGIT_ROWS):
        rows = slice(start, start + _LOGIT_ROWS)
        truth = model.logits(ends[rows]).log_softmax(-1)
        for run, other in enumerate(others):
            log_p = model.logits(other[rows]).log_softmax(-1)
            sums[run] += float((truth.exp() * (truth - log_p)).sum())
    divergences: npt.NDArray[np.float64] = (sums / ends.shape[0]).clamp(min=0).numpy()
    return divergences
