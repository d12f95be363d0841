"""What a setting's logits cost beside the dense model's: perplexity, divergence, greedy tokens."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Truth:
    """What the dense model says at some positions of a text, and what the text says."""

    targets: torch.Tensor  # int64 [positions], the tokens that follow
    shares: torch.Tensor  # float32 [positions, vocabulary], probabilities
    greedy: torch.Tensor  # int64 [positions]
    entropy: torch.Tensor  # float32 [positions], nats

    @classmethod
    def of(cls, logits: torch.Tensor, targets: torch.Tensor) -> "Truth":
        """logits: float32 [positions, vocabulary]."""
        log_p = logits.log_softmax(-1)
        shares = log_p.exp()
        return cls(targets, shares, logits.argmax(-1), _cross_entropy(shares, log_p))


@dataclass(slots=True)
class Losses:
    """Sums over scored positions."""

    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    scored: int = 0

    def add(self, truth: Truth, logits: torch.Tensor) -> None:
        """logits: float32 [positions, vocabulary], of the same positions."""
        log_q = logits.log_softmax(-1)
        self.nll -= float(log_q.gather(1, truth.targets[:, None]).double().sum())
        self.kl += float((_cross_entropy(truth.shares, log_q) - truth.entropy).double().sum())
        self.agreed += int((truth.greedy == logits.argmax(-1)).sum())
        self.scored += truth.targets.numel()

    def __add__(self, other: "Losses") -> "Losses":
        return Losses(
            self.nll + other.nll,
            self.kl + other.kl,
            self.agreed + other.agreed,
            self.scored + other.scored,
        )

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.scored)


def _cross_entropy(shares: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """-sum of p log q, [positions]: one pass over both, where a product would make a third."""
    return torch.bmm(shares[:, None], log_q[:, :, None]).flatten().neg_()
