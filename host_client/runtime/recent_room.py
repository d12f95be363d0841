"""How much of a budget is for recent units (`recent`): what a user says, and what it comes to."""

from dataclasses import dataclass
from typing import Self

from csd_protocol.packed import Site
from csd_protocol.units import parse_size
from host_client.runtime.quality import Quality
from host_client.runtime.refusals import InvalidBudget, RequestRefused

AUTO = "auto"
SHARE_DEFAULT = 0.25  # of the memory that neurons have
NUMBER_BYTES, WORTH_BYTES = 4, 4


@dataclass(frozen=True, slots=True)
class RecentRoom:
    """Memory for recent units: a share of what the neurons of all layers have, or bytes."""

    share: float = 0.0
    size_bytes: int = 0

    @classmethod
    def parse(cls, text: str | int) -> Self:
        """From a share (`25%`) or a size (`200MB`, bytes). Raises InvalidBudget."""
        try:
            if isinstance(text, str) and text.strip().endswith("%"):
                share = float(text.strip()[:-1]) / 100
                size_bytes = 0
            else:
                share, size_bytes = 0.0, parse_size(text)
        except ValueError:
            share, size_bytes = -1.0, 0
        if not 0.0 <= share <= 1.0 or size_bytes < 0:
            raise InvalidBudget(
                f"{text!r} for recent units is neither a size like 200MB, nor a share like 25% of "
                f"the memory that neurons have, nor {AUTO!r}"
            )
        return cls(share, size_bytes)

    @classmethod
    def of(cls, text: str | int, quality: Quality, is_mixture: bool) -> Self:
        """What a run of this quality gives them. `auto`: SHARE_DEFAULT where they are of use.

        Raises InvalidBudget, RequestRefused.
        """
        why = "keeps every neuron, so a token's are those of any other" if quality.kept == 1 else ""
        if is_mixture:
            why = "of a mixture: its experts' neurons are not kept from one token to the next yet"
        if text == AUTO:
            return cls() if why else cls(SHARE_DEFAULT)
        room = cls.parse(text)
        if why and room != cls():
            raise RequestRefused(f"recent units of {text}: quality {quality} {why}. Ask for 0")
        return room

    def slots(self, neurons: int, layer_slot_bytes: int) -> int:
        """Of each layer, where it would have so many resident neurons without any.

        layer_slot_bytes: what one slot in every layer takes.
        """
        return int(neurons * self.share) or self.size_bytes // layer_slot_bytes


def slot_bytes(site: Site) -> int:
    """What one slot takes: the unit, and its number."""
    return site.unit_bytes + NUMBER_BYTES
