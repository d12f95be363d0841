"""What a synthetic model has in place of calibration: frequencies and a predictor that are made up.

Skew and overlap are those of a real model (SmolLM2, docs/PREDICTORS.md): of the units that are
active where a third is, the hottest third are 46 %, and two neighbouring tokens share 44 %.
"""

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import PackedModel
from csd_protocol.program_file import ProgramKind, encode_planted
from host_client.calibrate.gate_builder import build_gate
from host_client.calibrate.predictor import load_predictor
from host_client.driver import Drive
from host_client.model.catalog import store_frequencies

U32 = npt.NDArray[np.uint32]

SKEW = 0.4  # exponent of Zipf's law over a layer's neurons
OVERLAP = 0.12  # how often a neuron keeps from one token to the next what was drawn for it
RANK = 128  # of the predictor whose cost it stands for
TOKENS = 100_000  # that the counts are as of


def planted_counts(packed: PackedModel, active: float, seed: int) -> U32:
    """How often each neuron is active in TOKENS tokens [FFNs, neurons]: Zipf's law, shuffled."""
    ffns = packed.ffns()
    rng = np.random.Generator(np.random.PCG64([seed, len(packed.sites)]))
    weights = np.arange(1.0, ffns[0].count + 1) ** -SKEW
    shares = np.minimum(active * weights / weights.mean(), 1.0)
    counts = np.maximum(shares * TOKENS, 1.0).astype(np.uint32)
    return np.stack([rng.permutation(counts) for _ in ffns])


def plant(drive: Drive, packed: PackedModel, active: float, seed: int) -> PackedModel:
    """Frequencies as if this share of the neurons were active, and the program that draws them.

    Returns the new manifest.
    """
    counts = planted_counts(packed, active, seed)
    packed = store_frequencies(drive, packed.name, counts, TOKENS)
    program = encode_planted(
        packed.name,
        dict(enumerate(counts)),
        seed=seed,
        overlap=OVERLAP,
        width=packed.ffns()[0].cols,
        rank=RANK,
    )
    load_predictor(drive, packed, ProgramKind.PLANTED, program)
    return packed


def is_planted(drive: Drive, packed: PackedModel) -> bool:
    """Whether `plant` was done with this model; its program is loaded last."""
    programs = ((entry["model"], entry["kind"]) for entry in drive.programs())
    return (packed.name, ProgramKind.PLANTED) in programs


def load_router(drive: Drive, packed: PackedModel) -> None:
    """A mixture's own router as its gate: there the weights are all that there is to know."""
    gate = build_gate(drive, packed, lambda done, total: None)
    load_predictor(drive, packed, ProgramKind.GATE, gate)
