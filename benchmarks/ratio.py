"""The one result type of benchmarks."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Ratio:
    """Two rates in the same unit, more is better, and the least that ours over the other may be."""

    name: str
    ours: float
    reference: float
    unit: str
    floor: float
    against: str  # what the reference is
    notes: str = ""  # what a reader needs to judge the figure

    @property
    def ratio(self) -> float:
        return self.ours / self.reference

    @property
    def met(self) -> bool:
        return self.ratio >= self.floor

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio, "met": self.met}
