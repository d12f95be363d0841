"""Recent units: FFN neurons that were staged for the last tokens, kept as long as they are of use.

Neighbouring tokens want some of the same neurons. So each FFN has slots for units that were staged
in guided passes; the drive is told with each request what lies in them, and stages the rest. This
is the sliding window of "LLM in a flash" (Alizadeh et al., arXiv:2312.11514), whose size is given
in memory instead of tokens.

Who stays is decided by *worth*: a neuron gains 1 with each token that a program chose it for, and
loses a twentieth of what it has with each token. Between the last token alone and the whole text as
it is, this staged least (docs/PREDICTORS.md).

What lies in slots is computed, chosen or not, as what is resident is. So the output depends on it,
and with it on the tokens that were decoded before. It is forgotten when another text begins: the
output is a function of its own text, whatever the model was used for before.

Slots change when their layer is computed and at no other time, and what is asked of a layer for a
token is asked after the layer was computed for the token before: what the drive was told is true
when its answer is used. Sweeps neither use slots nor change them.
"""

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from csd_protocol.packed import PackedModel, Role, Site
from host_client.io import Buffer

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]
Bits = npt.NDArray[np.bool_]

WORTH_KEPT = np.float32(0.95)  # of a neuron's worth, from one token to the next


class RecentSite:
    """The slots of one FFN. The first `units.size` of them are in use."""

    def __init__(self, site: Site, slots: int) -> None:
        buffer = Buffer(slots * site.unit_bytes)
        self._slots = buffer.array.reshape(slots, site.unit_bytes).view(np.uint16)
        self._units: U32 = np.empty(slots, np.uint32)
        self._used = 0
        self._worth: F32 = np.zeros(site.count, np.float32)

    @property
    def units(self) -> U32:
        """uint32 [n], in no order."""
        return self._units[: self._used]

    @property
    def values(self) -> U16:
        """uint16 [n, unit bytes / 2], of `units`. Good until the next `keep`."""
        return self._slots[: self._used]

    @property
    def size_bytes(self) -> int:
        """Of host memory."""
        return self._slots.nbytes + self._units.nbytes + self._worth.nbytes

    @property
    def held(self) -> Bits:
        """Which units of the site lie here [count]."""
        flags = np.zeros(self._worth.size, np.bool_)
        flags[self.units] = True
        return flags

    def forget(self) -> None:
        """Nothing lies here, and no unit is worth more than another."""
        self._used = 0
        self._worth[:] = 0

    def choose(self, predicted: U32) -> None:
        """A token's units were chosen: each is worth more, all others less."""
        self._worth *= WORTH_KEPT
        self._worth[predicted] += 1

    def keep(self, units: U32, values: U16) -> None:
        """Takes those of the staged units [n] that are worth more than what lies here.

        values: uint16 [n, unit bytes / 2]. Broken off, it leaves nothing here.
        """
        used = self._used
        stays = self._worthiest(np.concatenate([self._units[:used], units]))
        rows = np.flatnonzero(stays[used:])
        freed = np.flatnonzero(~stays[:used])
        slots = np.concatenate([freed, np.arange(used, used + rows.size - freed.size)])
        self._used = 0
        _copy_rows(values, rows, self._slots, slots)
        self._units[slots] = units[rows]
        self._used = used + rows.size - freed.size

    def _worthiest(self, units: U32) -> Bits:
        """Which of the units there are slots for [n]."""
        stays = np.ones(units.size, np.bool_)
        surplus = units.size - self._units.size
        if surplus > 0:
            stays[np.argpartition(self._worth[units], surplus - 1)[:surplus]] = False
        return stays


class RecentUnits:
    """Recent units of all FFNs of one model. Every method is the compute thread's."""

    def __init__(self, model: PackedModel, slots: int) -> None:
        """slots: of each FFN, one at least."""
        ffns = [site for site in model.sites if site.role is Role.FFN]
        self._sites = {site.site: RecentSite(site, slots) for site in ffns}
        self._text: weakref.ref[Any] | None = None  # the KV cache of the text they are of

    @property
    def size_bytes(self) -> int:
        """Of host memory."""
        return sum(recent.size_bytes for recent in self._sites.values())

    def of(self, site: Site) -> RecentSite | None:
        """The slots of a site; None: it has none."""
        return self._sites.get(site.site)

    def go_on(self, cache: object | None) -> None:
        """A guided pass over the text of a KV cache begins; None: of a text of its own."""
        if cache is None or self._text is None or self._text() is not cache:
            self.forget()
            self._text = None if cache is None else weakref.ref(cache)

    def forget(self) -> None:
        """Nothing is held."""
        for recent in self._sites.values():
            recent.forget()


@njit(nogil=True, cache=True)
def _copy_rows(source: Any, rows: Any, target: Any, places: Any) -> None:
    """target[places[i]] = source[rows[i]], without a copy in between."""
    for i in range(rows.shape[0]):
        target[places[i]] = source[rows[i]]
