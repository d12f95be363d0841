"""Requests that cannot be met, each with what would be."""

from csd_protocol.units import format_size


class RequestRefused(ValueError):
    """What was asked for cannot be given; the message says what can."""


class BudgetTooSmall(RequestRefused):
    """No plan fits the budget. `smallest_bytes` is the least that would do."""

    def __init__(self, budget_bytes: int, smallest_bytes: int, why: str) -> None:
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes
        super().__init__(
            f"a budget of {format_size(budget_bytes)} cannot work: {why} take at least "
            f"{format_size(smallest_bytes)} ({smallest_bytes} bytes). "
            f"Raise --dram to that, or lower --context"
        )


class InvalidBudget(RequestRefused):
    """A budget that is neither a size nor a share."""


class InvalidQuality(RequestRefused):
    """A quality that this version cannot give."""


class NoPredictor(RequestRefused):
    """A kept fraction was asked for, and the drive has no active program for the model."""


class ContextExceeded(RequestRefused):
    """More tokens than the plan made room for in the KV cache."""


class WindowTooSmall(RequestRefused):
    """The drive's window cannot hold what has to be staged at once."""
