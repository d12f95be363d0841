"""What a setting's logits cost beside the dense model's: perplexity, divergence, greedy tokens."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Losses:
    """Sums over scored positions."""

    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    scored: int = 0

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


@dataclass(frozen=True, slots=True)
class Truth:
    """What the dense model says at some positions of a text, and what the text says."""

    targets: torch.Tensor  # int64 [positions], the tokens that follow
    shares: torch.Tensor  # float32 [positions, vocabulary], probabilities
    greedy: torch.Tensor  # int64 [positions]
    entropy: torch.Tensor  # float32 [positions], nats
    losses: Losses  # the dense model's own

    @classmethod
    def of(cls, logits: torch.Tensor, targets: torch.Tensor) -> "Truth":
        """logits: float32 [positions, vocabulary]."""
        log_p = logits.log_softmax(-1)
        shares = log_p.exp()
        count = targets.numel()
        own = Losses(_nll(log_p, targets), 0.0, count, count)
        return cls(targets, shares, logits.argmax(-1), _cross_entropy(shares, log_p), own)

    def losses_of(self, logits: torch.Tensor) -> Losses:
        """Of other logits at the same positions."""
        log_q = logits.log_softmax(-1)
        divergence = _cross_entropy(self.shares, log_q) - self.entropy
        agreed = int((self.greedy == logits.argmax(-1)).sum())
        return Losses(
            _nll(log_q, self.targets),
            float(divergence.double().sum()),
            agreed,
            self.targets.numel(),
        )


def _nll(log_p: torch.Tensor, targets: torch.Tensor) -> float:
    return -float(log_p.gather(1, targets[:, None]).double().sum())


def _cross_entropy(shares: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """-sum of p log q, [positions]: one pass over both, where a product would make a third."""
    return torch.bmm(shares[:, None], log_q[:, :, None]).flatten().neg_()
