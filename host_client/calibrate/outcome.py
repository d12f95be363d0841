"""What `csd bench quality` reports: JSON with stable keys. Sizes in bytes, divergence in nats."""

from collections.abc import Sequence

from pydantic import BaseModel

from host_client.calibrate.losses import Losses


class LayerFigures(BaseModel):
    """One layer of one setting. None where the measurement cannot know it."""

    layer: int
    kept: int  # units that were to be computed
    recall: float | None  # of the true top `kept`: share that was computed
    precision: float | None  # of what was computed: share that is in the true top `kept`
    recall_third: float | None  # of the true top third, a third chosen by the same scores
    staged_units: float | None  # a token: computed and not resident
    kept_groups: int | None  # KV groups of attention, none of them resident; None: all
    groups_recall: float | None  # of the true top `kept_groups`: share that was computed


class Outcome(BaseModel):
    """What one setting did, over all scored positions."""

    name: str  # as it is asked for
    program: str  # the curve it belongs to
    correction: str | None  # the low-bit rows that spoke for what was left out
    perplexity: float
    against_dense: float  # perplexity / dense - 1
    agreement: float  # share of positions with the dense model's greedy token
    kl_nats: float  # mean KL(dense || setting)
    computed_share: float | None  # of all FFN units
    recall: float | None
    precision: float | None
    recall_third: float | None
    staged_bytes_per_token: float  # of FFN units in the lab; of all that crossed, from a drive
    heads_bytes_per_token: float | None  # of KV groups, none of them resident
    groups_recall: float | None  # over the layers that leave groups out
    layers: list[LayerFigures]

    @classmethod
    def of(
        cls,
        name: str,
        program: str,
        losses: Losses,
        dense: Losses,
        layers: list[LayerFigures],
        staged_bytes_per_token: float,
        correction: str | None = None,
        computed_share: float | None = None,
        heads_bytes_per_token: float | None = None,
    ) -> "Outcome":
        """Means of the layers' figures, and what the losses come to beside the dense model's."""
        return cls(
            name=name,
            program=program,
            correction=correction,
            perplexity=losses.perplexity,
            against_dense=losses.perplexity / dense.perplexity - 1,
            agreement=losses.agreed / losses.scored,
            kl_nats=losses.kl / losses.scored,
            computed_share=computed_share,
            recall=_mean([layer.recall for layer in layers]),
            precision=_mean([layer.precision for layer in layers]),
            recall_third=_mean([layer.recall_third for layer in layers]),
            staged_bytes_per_token=staged_bytes_per_token,
            heads_bytes_per_token=heads_bytes_per_token,
            groups_recall=_mean([layer.groups_recall for layer in layers]),
            layers=layers,
        )


class QualityReport(BaseModel):
    """A table: every setting on the same positions of the same text."""

    tokens: int
    scored: int  # positions: all but the first of each window
    window: int
    dense_perplexity: float
    dense_bytes_per_token: float  # of a pass that leaves nothing out, counted as in `Outcome`
    dense_heads_bytes_per_token: float | None
    outcomes: list[Outcome]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
