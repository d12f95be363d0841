"""A bias behind a staged projection: vectors are small, and always resident."""

import torch
from torch import nn


class Biased(nn.Module):
    """`projection`, and a vector added to each of its outputs. [..., in] -> [..., out]."""

    def __init__(self, projection: nn.Module, bias: torch.Tensor) -> None:
        """bias: float32 [out]."""
        super().__init__()
        self.projection = projection
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.projection(x)
        return made + self.bias.to(made.dtype)
