"""Units of a packed model as float32 tensors, each read off the drive and checked."""

import numpy as np
import numpy.typing as npt
import torch

from csd_protocol.packed import PackedModel, Role, Site
from host_client.runtime import kernels
from host_client.runtime.plain_reads import PlainReads
from host_client.runtime.row_arithmetic import Encoding

U16 = npt.NDArray[np.uint16]


def site_values(reads: PlainReads, packed: PackedModel, site: Site) -> torch.Tensor:
    """All units of a site as float32 [count, rows, cols]."""
    return widened(packed, site, reads.site_units(site))


def widened(packed: PackedModel, site: Site, words: U16) -> torch.Tensor:
    """Units of a site as they lie, uint16 [n, rows, words], as float32 [n, rows, cols]."""
    values = np.empty((words.shape[0] * site.rows, site.cols), np.float32)
    rows = words.reshape(values.shape[0], -1)
    kernels.widen_rows(rows, None, values, Encoding.of(site, packed.dtype))
    return torch.from_numpy(values).reshape(-1, site.rows, site.cols)


def norm_parts(reads: PlainReads, packed: PackedModel, layer: int) -> dict[str, torch.Tensor]:
    """A layer's norms by name, flat."""
    site = packed.find(Role.NORMS, layer)
    values = site_values(reads, packed, site).reshape(-1)
    sizes = [int(np.prod(part.shape)) for part in site.parts]
    pieces = values.split(sizes)
    return {part.name: piece for part, piece in zip(site.parts, pieces, strict=True)}
