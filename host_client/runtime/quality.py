"""Quality: what a user asks of the output, and so what may be left out.

exact                           the dense model's output
KEPT                            the fraction of the FFN neurons that is kept, allotted to layers
                                as calibrated, or the same in each
KEPT+correct                    the same, the drive's low-bit contribution for the others added
...+heads=SHARE                 and only this share of each layer's KV groups
...+uniform                     the same share in every layer, whatever calibration says
"""

from dataclasses import dataclass

from host_client.runtime.refusals import InvalidQuality

_CORRECT, _HEADS, _UNIFORM = "correct", "heads=", "uniform"


@dataclass(frozen=True, slots=True)
class Quality:
    """`exact`, or the fractions in (0, 1] of each layer's FFN neurons and KV groups to keep."""

    kept: float = 1.0
    corrected: bool = False  # what was left out of an FFN counts with the drive's low-bit rows
    heads: float = 1.0
    uniform: bool = False  # every layer keeps the same share, though calibration would allot

    @property
    def exact(self) -> bool:
        return self.kept >= 1.0 and self.heads >= 1.0

    @classmethod
    def parse(cls, text: "str | float | Quality") -> "Quality":
        """`exact`, or such as `0.5`, `0.1+correct`, `0.5+heads=0.67`. Raises InvalidQuality."""
        if isinstance(text, Quality):
            return text
        first, *rest = str(text).split("+")
        if first == "exact" and not rest:
            return cls()
        kept = _share(first, text)
        corrected, heads, uniform = False, 1.0, False
        for word in rest:
            if word == _CORRECT and not corrected and kept < 1.0:
                corrected = True
            elif word.startswith(_HEADS) and heads == 1.0:
                heads = _share(word.removeprefix(_HEADS), text)
            elif word == _UNIFORM and not uniform and kept < 1.0:
                uniform = True
            else:
                raise _invalid(text)
        return cls(kept, corrected, heads, uniform)

    def __str__(self) -> str:
        if self.exact:
            return "exact"
        words = [f"{self.kept:g}"]
        words += [_CORRECT] if self.corrected else []
        words += [_UNIFORM] if self.uniform else []
        words += [f"{_HEADS}{self.heads:g}"] if self.heads < 1.0 else []
        return "+".join(words)


def _share(word: str, text: object) -> float:
    try:
        share = float(word)
    except ValueError:
        share = -1.0
    if not 0.0 < share <= 1.0:
        raise _invalid(text)
    return share


def _invalid(text: object) -> InvalidQuality:
    return InvalidQuality(
        f"quality {text!r} is neither 'exact' nor a kept fraction between 0 and 1, like 0.5, "
        f"0.1+correct, 0.5+heads=0.67 or 0.5+uniform"
    )
