"""Modules that take the place of a transformers model's own and compute on units.

Each asks the engine for the staged part of its site and computes on the resident and the staged
part one after the other, weights as they lie, in float32. None of them has parameters of its own.
"""

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from csd_protocol.packed import Role, Site
from host_client.runtime import kernels
from host_client.runtime.engine import Engine
from host_client.runtime.observed import Witness

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
BOOL = npt.NDArray[np.bool_]

# layer, units [n], activity float32 [tokens, n]: |silu(gate) * up|; called once a part of a layer
Observer = Callable[[int, U32, F32], None]


class Auditor(Protocol):
    """Looks at some FFNs of guided passes."""

    def looks_at(self, site: Site) -> bool:
        """Whether it wants a witness of this one."""
        ...

    def audit(self, site: Site, x: F32, computed: BOOL, witness: Witness) -> None:
        """It is computed, by its true input float32 [1, hidden]; computed: which units, [n]."""
        ...


def _flat(x: torch.Tensor) -> F32:
    """[..., columns] as a contiguous float32 array [rows, columns]."""
    flat = x.detach().to(torch.float32).reshape(-1, x.shape[-1]).contiguous()
    return flat.numpy()


def _like(x: torch.Tensor, values: F32) -> torch.Tensor:
    """[rows, columns] in the leading shape and the type of `x`."""
    return torch.from_numpy(values).reshape(*x.shape[:-1], values.shape[-1]).to(x.dtype)


class StagedEmbedding(nn.Module):
    """Token rows of the embedding. ids [batch, tokens] -> float32 [batch, tokens, hidden]."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine
        self._site = engine.model.find(Role.EMBED)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        engine = self._engine
        engine.begin(ids.numel())
        flat = ids.reshape(-1).numpy().astype(np.uint32)
        rows, where = np.unique(flat, return_inverse=True)
        table = np.empty((rows.size, self._site.cols), np.float32)
        for part, values in engine.embedding_rows(rows):
            widened = np.empty((part.size, self._site.cols), np.float32)
            kernels.widen_rows(values, None, widened, engine.encoding(self._site))
            table[np.searchsorted(rows, part)] = widened
        return torch.from_numpy(table[where.reshape(-1)]).reshape(*ids.shape, self._site.cols)


class Projection(Enum):
    QUERY = "q_proj"
    KEY = "k_proj"
    VALUE = "v_proj"
    OUTPUT = "o_proj"


class StagedProjection(nn.Module):
    """One of an attention's projections, resident or staged. [..., in] -> [..., out].

    In a guided pass KV groups may be missing: their queries are 0, and what attention makes of them
    adds nothing to the output.
    """

    def __init__(self, engine: Engine, layer: int, projection: Projection) -> None:
        super().__init__()
        role = Role.KV if projection in (Projection.KEY, Projection.VALUE) else Role.HEADS
        self._engine, self._projection = engine, projection
        self._site = engine.model.find(role, layer)
        # A unit is query rows, then output columns as rows; or keys, then values.
        self._half = self._site.rows // 2
        second = projection in (Projection.VALUE, Projection.OUTPUT)
        self._rows = _half_of_units(self._site, second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat, encoding = _flat(x), self._engine.encoding(self._site)
        is_output = self._projection is Projection.OUTPUT
        width = self._site.cols if is_output else self._site.count * self._half
        out = np.zeros((flat.shape[0], width), np.float32)
        for units, values in self._parts():
            weights = values.reshape(units.size * self._site.rows, -1)
            rows, columns = self._rows[: units.size * self._half], self._columns_of(units)
            if is_output:
                mixed = np.ascontiguousarray(flat[:, columns])
                kernels.rows_axpy(mixed, weights, rows, out, encoding)
            else:
                part = np.empty((flat.shape[0], rows.size), np.float32)
                kernels.rows_dot(flat, weights, rows, part, encoding)
                out[:, columns] = part
        return _like(x, out)

    def _parts(self) -> Iterator[tuple[U32, U16]]:
        """The units that are here, with their values: resident ones, then staged ones."""
        entry = self._engine.resident[self._site.site]
        if entry.units.size:
            yield entry.units, entry.values
        block = self._engine.block(self._site) if entry.missing.size else None
        if block is not None:
            yield block.units, block.values

    def _columns_of(self, units: U32) -> I64 | slice:
        """What these units are of all queries, keys or values, or of the output's input."""
        if units.size == self._site.count:
            return slice(None)
        starts = units.astype(np.int64) * self._half
        return (starts[:, None] + np.arange(self._half)).reshape(-1)


def _half_of_units(site: Site, second: bool) -> I64:
    """Row numbers of the first or the second half of every unit of a site, in order."""
    half = site.rows // 2
    starts = np.arange(site.count) * site.rows + (half if second else 0)
    return (starts[:, None] + np.arange(half)).reshape(-1)


class StagedFfn(nn.Module):
    """A SwiGLU FFN on resident and staged neurons. [..., hidden] -> [..., hidden]."""

    def __init__(self, engine: Engine, layer: int) -> None:
        super().__init__()
        self._engine, self._layer = engine, layer
        self._site = engine.model.find(Role.FFN, layer)
        self.observer: Observer | None = None
        self.auditor: Auditor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        engine, flat = self._engine, _flat(x)
        out = np.zeros_like(flat)
        encoding = engine.encoding(self._site)
        auditor = self.auditor if self.auditor and self.auditor.looks_at(self._site) else None
        is_watched = engine.observes or auditor is not None
        witness = Witness(flat.shape[1], encoding) if is_watched else None
        correction = engine.correct(self._site, flat) if engine.corrects else None
        entry = engine.resident[self._site.site]
        computed = entry.held
        if entry.units.size:  # whatever was chosen, and while that is still on its way
            self._add(flat, out, entry.units, entry.values, witness)
        for block in engine.blocks(self._site):
            self._add(flat, out, block.units, block.values, witness)
            computed[block.units] = True
        if not engine.guided:
            for units, values in engine.missed_parts(self._site, computed):
                self._add(flat, out, units, values)
        if correction is not None:
            out += correction()
        if witness is not None and engine.observes:
            active = witness.most_active(engine.kept_of(self._site), self._site.count)
            engine.observe(self._site, active)
        if witness is not None and auditor is not None:
            auditor.audit(self._site, flat, computed, witness)
        engine.leave(self._layer)
        return _like(x, out)

    def _add(
        self, x: F32, out: F32, units: U32, values: U16, witness: Witness | None = None
    ) -> None:
        is_seen = self.observer is not None or witness is not None
        activity = np.empty((x.shape[0], units.size), np.float32) if is_seen else None
        kernels.neurons(x, values, None, out, self._engine.encoding(self._site), activity)
        if activity is None:
            return
        if self.observer is not None:
            self.observer(self._layer, units, activity)
        if witness is not None:
            witness.see(units, values, activity)


class StagedHead(nn.Module):
    """The output head: resident rows, then the others in slices. [..., hidden] -> [..., vocab]."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        engine, flat = self._engine, _flat(x)
        entry = engine.resident[engine.head.site]
        logits = np.empty((flat.shape[0], engine.head.count), np.float32)
        if entry.units.size:
            self._fill(flat, entry.units, entry.values, logits)
        for units, values in engine.head_slices():
            self._fill(flat, units, values, logits)
        return torch.from_numpy(logits).reshape(*x.shape[:-1], engine.head.count)

    def _fill(self, x: F32, units: U32, values: U16, logits: F32) -> None:
        """Rows of the head are kept in order, so each part fills one run of columns."""
        part = np.empty((x.shape[0], units.size), np.float32)
        kernels.rows_dot(x, values, None, part, self._engine.encoding(self._engine.head))
        logits[:, units[0] : units[-1] + 1] = part
