"""Units that cannot be read: the error that names all of them, for people and for hosts."""

from collections.abc import Iterable
from itertools import islice

import numpy as np

from csd_device.errors import CommandError
from csd_device.firmware.commands import U32, LostUnits
from csd_device.firmware.models import LoadedModel, SiteRecord
from csd_device.ftl import PageReads
from csd_protocol.status import Status

_NAMED_MAX = 8  # units of a site, and sites of a command, that a detail lists


class PieceUnreadable(CommandError):
    """Some units of one piece. `reads` is what was read of the others."""

    def __init__(self, status: Status, why: str, lost: list[LostUnits], reads: PageReads) -> None:
        super().__init__(status, why)
        self.lost = lost
        self.reads = reads


class UnitsUnreadable(CommandError):
    """All units that a staging command needs and cannot have, by site and copy."""

    def __init__(self, model: LoadedModel, pieces: Iterable[PieceUnreadable]) -> None:
        """The first piece says why; more than one says the more severe status."""
        met = list(pieces)
        self.lost = _united(lost for piece in met for lost in piece.lost)
        unread = any(piece.status is Status.UNRECOVERED_READ for piece in met)
        super().__init__(
            Status.UNRECOVERED_READ if unread else Status.GUARD_CHECK,
            f"{model.name}: {_described(model, self.lost)}: {met[0].detail}. "
            + _advice(model.site(self.lost[0].site)),
        )


def _united(parts: Iterable[LostUnits]) -> tuple[LostUnits, ...]:
    """One entry a site and copy, in that order."""
    units: dict[tuple[int, int], U32] = {}
    for part in parts:
        key = (part.site, part.copy)
        units[key] = np.union1d(units[key], part.units) if key in units else part.units
    return tuple(LostUnits(site, copy, units[site, copy]) for site, copy in sorted(units))


def _described(model: LoadedModel, lost: tuple[LostUnits, ...]) -> str:
    named = [_site_text(model.site(part.site), part) for part in islice(lost, _NAMED_MAX)]
    rest = len(lost) - len(named)
    return "; ".join(named) + (f"; and units of {rest} more sites" if rest else "")


def _site_text(site: SiteRecord, lost: LostUnits) -> str:
    numbers = ", ".join(str(unit) for unit in lost.units[:_NAMED_MAX])
    rest = lost.units.size - _NAMED_MAX
    more = f" and {rest} more" if rest > 0 else ""
    word = "unit" if lost.units.size == 1 else "units"
    layer = f", layer {site.layer}" if site.layer >= 0 else ""
    of = f", copy {lost.copy} of {site.copies}" if site.copies > 1 else ""
    return f"{word} {numbers}{more} of {site.name} (site {site.site}{layer}{of})"


def _advice(site: SiteRecord) -> str:
    if site.copies > 1:
        return "Another copy may have what this one lost"
    return "Pack the model again; in several copies, another would have it"
