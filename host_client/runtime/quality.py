"""Quality: what a user asks of the output, and so what may be left out."""

from dataclasses import dataclass

from host_client.runtime.refusals import InvalidQuality


@dataclass(frozen=True, slots=True)
class Quality:
    """`exact`, or the fraction of each layer's FFN neurons that is kept, in (0, 1)."""

    kept: float = 1.0

    @property
    def exact(self) -> bool:
        return self.kept >= 1.0

    @classmethod
    def parse(cls, text: "str | float | Quality") -> "Quality":
        """`exact`, `1.0`, or a kept fraction such as `0.5`. Raises InvalidQuality."""
        if isinstance(text, Quality):
            return text
        if text == "exact":
            return cls()
        try:
            kept = float(text)
        except ValueError:
            kept = -1.0
        if not 0.0 < kept <= 1.0:
            raise InvalidQuality(
                f"quality {text!r} is neither 'exact' nor a kept fraction between 0 and 1, like 0.5"
            )
        return cls(kept)

    def __str__(self) -> str:
        return "exact" if self.exact else f"{self.kept:g}"
