"""The best that a thin linear map can say of which units are wanted: reduced-rank regression.

Inputs are whitened first. So the directions that are kept are those that say most over the inputs
that there are, and not those along which a map happens to be steep.
"""

import torch

_RIDGE = 1e-2  # of the mean second moment
_SHARE_LEAST = 0.01  # a unit that is wanted never, or always, has no finite log odds


class Whitened:
    """Inputs float32 [rows, hidden] in coordinates in which they are uncorrelated (ridge)."""

    def __init__(self, x: torch.Tensor) -> None:
        moments = x.t() @ x / len(x)
        moments.diagonal().add_(_RIDGE * moments.diagonal().mean())
        self._root: torch.Tensor = torch.linalg.cholesky(moments)
        whitened = torch.linalg.solve_triangular(self._root, x.t(), upper=False)
        self._rows: torch.Tensor = whitened / len(x)

    def correlations(self, wanted: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """[hidden, units], with wanted [rows, units] of the mean `share` [units]."""
        return self._rows @ (wanted - share)

    def inner(self, directions: torch.Tensor) -> torch.Tensor:
        """[rank, hidden]: what maps inputs onto directions [hidden, rank]."""
        mapped: torch.Tensor = torch.linalg.solve_triangular(self._root.t(), directions, upper=True)
        return mapped.t().contiguous()


def leading_directions(squares: torch.Tensor, rank: int) -> torch.Tensor:
    """[hidden, rank] of the sum of correlations times their transpose, [hidden, hidden]."""
    ascending: torch.Tensor = torch.linalg.eigh(squares).eigenvectors
    return ascending[:, -rank:]


def as_log_odds(outer: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [units, rank] and biases [units] of log odds, to first order, from those of shares."""
    share = share.clamp(_SHARE_LEAST, 1 - _SHARE_LEAST)
    slope = 1 / (share * (1 - share))
    return (outer * slope[:, None]).contiguous(), share.logit()
