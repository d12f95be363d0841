"""Units of a packed model as float32 tensors, each read off the drive and checked."""

import numpy as np
import torch

from csd_protocol.packed import PackedModel, Role, Site
from host_client.runtime.plain_reads import PlainReads


def site_values(reads: PlainReads, packed: PackedModel, site: Site) -> torch.Tensor:
    """All units of a site as float32 [count, rows, cols]."""
    dtype = torch.bfloat16 if packed.dtype == "bfloat16" else torch.float16
    patterns = reads.site_units(site)
    return torch.from_numpy(patterns.view(np.int16)).view(dtype).float()


def norm_parts(reads: PlainReads, packed: PackedModel, layer: int) -> dict[str, torch.Tensor]:
    """A layer's norms by name, flat."""
    site = packed.find(Role.NORMS, layer)
    values = site_values(reads, packed, site).reshape(-1)
    sizes = [int(np.prod(part.shape)) for part in site.parts]
    pieces = values.split(sizes)
    return {part.name: piece for part, piece in zip(site.parts, pieces, strict=True)}
