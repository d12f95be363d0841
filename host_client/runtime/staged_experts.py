"""The experts of one mixture layer, in the place of transformers' own module of that name."""

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from host_client.runtime import kernels
from host_client.runtime.engine import Engine
from host_client.runtime.experts import Experts
from host_client.runtime.layers import Observer

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]


class StagedExperts(nn.Module):
    """SwiGLU experts on resident and staged neurons; which and how much of each is the router's.

    x [rows, hidden], index and weight [rows, experts of a token] -> [rows, hidden].
    """

    def __init__(self, engine: Engine, experts: Experts, layer: int) -> None:
        super().__init__()
        self._engine, self._experts, self._layer = engine, experts, layer
        self.observer: Observer | None = None  # told of each expert by its program layer

    def forward(self, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        flat = x.detach().to(torch.float32).contiguous().numpy()
        routes = _Routes(index.numpy().astype(np.int64), weight.detach().float().numpy())
        chosen = [int(expert) for expert in np.unique(routes.index)]
        out = np.zeros_like(flat)
        blocks = self._experts.stage(self._layer, chosen)
        for expert in chosen:
            entry = self._engine.resident[self._experts.sites[self._layer][expert].site]
            if entry.units.size:
                self._add(flat, routes, expert, entry.units, entry.values, out)
        for expert, block in blocks:
            if block.units.size:
                self._add(flat, routes, expert, block.units, block.values, out)
        self._engine.leave(self._layer)
        return torch.from_numpy(out).to(x.dtype)

    def _add(
        self, x: F32, routes: "_Routes", expert: int, units: U32, values: U16, out: F32
    ) -> None:
        """Adds what these neurons of an expert give to the rows that were sent to it."""
        rows, weights = routes.to(expert)
        sent = np.ascontiguousarray(x[rows])
        activity = np.empty((rows.size, units.size), np.float32) if self.observer else None
        part = np.zeros_like(sent)
        site = self._experts.sites[self._layer][expert]
        kernels.neurons(sent, values, None, part, self._engine.encoding(site), activity)
        out[rows] += part * weights[:, None]
        if self.observer is not None and activity is not None:
            self.observer(self._engine.model.program_layer(site), units, activity)


class _Routes:
    """Where the router sent each row. index, weight: [rows, experts of a token]."""

    def __init__(self, index: I64, weight: F32) -> None:
        self.index, self._weight = index, weight

    def to(self, expert: int) -> tuple[I64, F32]:
        """Rows [n] that go to an expert, each once, and its weight in each of them [n]."""
        rows, place = np.nonzero(self.index == expert)
        return rows, self._weight[rows, place]
