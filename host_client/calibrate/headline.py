"""The headline table: models of full size within a fraction of the memory that they take otherwise.

What the plan says of a row follows from its config alone: no weights, no drive. Its frequencies are
those that `planting` plants, so that a synthetic model on a drive has the same plan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from csd_protocol.packed import Bits, PackedModel
from host_client.calibrate.planting import planted_counts
from host_client.model.packer import manifest_of
from host_client.model.synthetic import SEED_DEFAULT, SyntheticCheckpoint, open_synthetic
from host_client.runtime.memory_limit import allowed
from host_client.runtime.plan import Plan, make_plan
from host_client.runtime.quality import Quality
from host_client.runtime.token_time import CLASSES, TokenTime, Volumes, token_time, volumes_of

GB = 10**9
RESERVE_BYTES = 1 << 30  # of the machine's memory, for everybody else
LOOKAHEAD = 1
_OTHER_SHARE = 5 / 16  # budget of a shape that the table does not name: that of LLaMA 3 8B


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the table. shape: as `open_synthetic` takes it; budgets: bytes by unit bits."""

    shape: str
    title: str | None = None  # None: its name on the drive
    conventional_bytes: int | None = None
    budgets: Mapping[Bits, int] | None = None

    def open(self) -> SyntheticCheckpoint:
        """Raises a ModelError."""
        return open_synthetic(self.shape, SEED_DEFAULT)

    def budget_bytes(self, packed: PackedModel, bits: Bits) -> int:
        if self.budgets is None:
            return int(packed.weights_bytes * _OTHER_SHARE)
        return self.budgets[bits]


def _row(shape: str, title: str, conventional: float, budget: float, at_4_bits: float) -> Row:
    """Sizes in GB. Units of 8 bits have half the budget of units of 16."""
    budgets: dict[Bits, int] = {
        16: int(budget * GB),
        8: int(budget * GB / 2),
        4: int(at_4_bits * GB),
    }
    return Row(shape, title, int(conventional * GB), budgets)


ROWS = (
    _row("llama3-8b", "LLaMA 3 8B", 16, 5, 1.5),
    _row("chatglm3-6b", "ChatGLM 6B", 12, 3.5, 1.2),
    _row("qwen-7b", "Qwen 7B", 14, 4, 1.3),
    _row("qwen2-7b", "Qwen 2 7B", 14, 4, 1.3),
    _row("mixtral-8x7b", "Mixtral 8x7B", 87, 24, 7),
)


def rows_of(shapes: Sequence[str]) -> list[Row]:
    """The table's row of each shape, else one with a budget of the same share."""
    named = {row.shape: row for row in ROWS}
    return [named.get(shape) or Row(shape) for shape in shapes]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What one quality stages and what a token of it takes, modelled, on each device class."""

    quality: Quality
    volumes: list[Volumes]
    times: list[TokenTime]

    @property
    def staged_bytes_per_token(self) -> float:
        return sum(step.staged_bytes for step in self.volumes)


@dataclass(frozen=True, slots=True)
class Modelled:
    """A row by its config alone."""

    row: Row
    packed: PackedModel
    plan: Plan
    outlooks: list[Outlook]  # exact, then what is active

    @property
    def title(self) -> str:
        return self.row.title or self.packed.name

    @property
    def conventional_bytes(self) -> int:
        """What the model takes otherwise: as the table says, else its weights at 16 bits."""
        return self.row.conventional_bytes or self.packed.weights_bytes_16bit


def model_row(
    row: Row, bits: Bits, active: float, context: int, host_bytes_per_s: float
) -> Modelled:
    """Raises a ModelError, BudgetTooSmall, InvalidQuality."""
    with row.open() as checkpoint:
        packed = manifest_of(checkpoint, checkpoint.name, bits)
    counts = planted_counts(packed, active, SEED_DEFAULT)
    plan = make_plan(packed, row.budget_bytes(packed, bits), context, counts)
    outlooks = []
    for quality in (Quality(), Quality.parse(active)):
        volumes = volumes_of(packed, plan, quality, counts)
        ahead = None if quality.exact else LOOKAHEAD
        times = [token_time(volumes, rates, host_bytes_per_s, ahead) for rates in CLASSES]
        outlooks.append(Outlook(quality, volumes, times))
    return Modelled(row, packed, plan, outlooks)


def budget_within(budget_bytes: int, memory_bytes: int) -> int:
    """As much of a budget as a machine with so much free memory can give a run beside the rest."""
    beside = allowed(0, budget_bytes) + RESERVE_BYTES
    return max(0, min(budget_bytes, memory_bytes - beside))
