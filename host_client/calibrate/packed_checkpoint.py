"""A packed model read back off the drive as the checkpoint it came from.

What is fitted to a model is then fitted to the very values that the drive holds, and needs nothing
but the drive.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from csd_protocol.packed import PackedModel, Site
from host_client.calibrate.packed_units import widened
from host_client.driver import Drive
from host_client.model.checkpoint import Dtype
from host_client.model.errors import MissingTensor
from host_client.model.families import Piece, SiteShape, find_family
from host_client.runtime.plain_reads import PlainReads

_KEPT_MAX = 2  # what was read last: of heads, and of keys and values


class PackedCheckpoint:
    """A `Checkpoint` over the sites of a packed model."""

    def __init__(self, drive: Drive, packed: PackedModel) -> None:
        """Raises DamagedRecord or CommandFailed when the model's CRC table cannot be read."""
        self._reads, self._packed = PlainReads(drive, packed), packed
        # A unit has rows of several tensors, which are asked for one after the other.
        self._units = lru_cache(maxsize=_KEPT_MAX)(self._read_units)

    @property
    def config(self) -> dict[str, Any]:
        return self._packed.config

    @property
    def source(self) -> str:
        return f"{self._packed.name} on the drive"

    @property
    def dtype(self) -> Dtype:
        return self._packed.dtype

    def names(self) -> Sequence[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[2].shape

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor: in the 16-bit type that it was packed in, float32 of levels.

        Raises UnitsLost.
        """
        site, shape, piece = self._find(name)
        first_row = _rows_before(shape, piece)
        # A row of a piece lies in one unit; a column tensor's rows lie across all units.
        first, last = 0, site.count
        if not piece.columns:
            first, last = start // piece.rows_per_unit, -(-stop // piece.rows_per_unit)
        if len(piece.shape) == 1:
            first, last = 0, 1
        units = self._units(site.site, first, last)
        stacked = units.reshape(last - first, shape.stack_rows, shape.width)
        rows = stacked[:, first_row : first_row + piece.rows_per_unit]
        values = rows.reshape(-1, shape.width).clone()
        if len(piece.shape) == 1:
            return values.reshape(-1)[start:stop]
        if piece.columns:
            return values.t()[start:stop]
        offset = first * piece.rows_per_unit
        return values[start - offset : stop - offset]

    def levels(self, name: str) -> None:
        """No tensor is kept as levels."""

    def _read_units(self, number: int, first: int, last: int) -> torch.Tensor:
        site = self._packed.sites[number]
        words = self._reads.units(site, first, last)
        if site.bits == 16:
            return torch.from_numpy(words.view(np.int16)).view(self._dtype)
        values = widened(self._packed, site, words)
        return values.to(self._dtype) if site.bits == 12 else values

    def digest(self) -> str:
        return self._packed.fingerprint

    def close(self) -> None:
        """The drive is the caller's."""

    def __enter__(self) -> "PackedCheckpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self._packed.dtype == "bfloat16" else torch.float16

    @cached_property
    def _places(self) -> dict[str, tuple[Site, SiteShape, Piece]]:
        family = find_family(self._packed.config, self.source)
        shapes = family.sites(self._packed.config)
        return {
            piece.tensor: (site, shape, piece)
            for site, shape in zip(self._packed.sites, shapes, strict=True)
            for piece in shape.pieces
        }

    def _find(self, name: str) -> tuple[Site, SiteShape, Piece]:
        if name not in self._places:
            raise MissingTensor(f"{self.source} has no tensor {name}. Pack the model again")
        return self._places[name]


def _rows_before(shape: SiteShape, piece: Piece) -> int:
    """Rows of the stack above this piece."""
    return sum(other.rows_per_unit for other in shape.pieces[: shape.pieces.index(piece)])
