"""Programs that say whatever they like: exact stays exact, and a kept fraction comes to an end."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from csd_protocol.program_file import (
    AttentionLayer,
    AttentionShape,
    FarsightBlock,
    FarsightBody,
    FarsightHead,
    GateLayer,
    ProgramKind,
    RolloutLayer,
    ShadowLayer,
    SvdLayer,
    TwoLayers,
    encode_farsight,
    encode_frequency,
    encode_gate,
    encode_lowrank,
    encode_mlp,
    encode_oracle,
    encode_planted,
    encode_rollout,
    encode_shadow,
    encode_svd,
    encode_window,
)
from csd_protocol.status import Status
from host_client.driver import CommandFailed

NAME, LAYERS, UNITS, HIDDEN, RANK, GROUP = "tied", 4, 160, 64, 4, 32
NEW = 5
EPS = 1e-5

Fill = Callable[..., np.ndarray]  # of a shape


def of(value: float) -> Fill:
    return lambda *shape: np.full(shape, value, np.float32)


def alternating(*shape: int) -> np.ndarray:
    """As large as float16 is, now up, now down."""
    signs = np.where(np.arange(np.prod(shape)) % 2, 1.0, -1.0)
    return (60_000 * signs).astype(np.float32).reshape(shape)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


FILLS: dict[str, Fill] = {
    "zeros": of(0.0),
    "constant": of(1.0),
    "tiny": of(1e-7),
    "huge": of(60_000.0),
    "minus": of(-60_000.0),
    "alternating": alternating,
    "noise": noise,
}


def layers(make: Callable[[], Any]) -> dict[int, Any]:
    return {layer: make() for layer in range(LAYERS)}


def shadow_layer(fill: Fill) -> ShadowLayer:
    wide, one = fill(UNITS, HIDDEN), np.ones(HIDDEN, np.float32)
    return ShadowLayer(norm=one, gate=wide, up=wide, down_norm=np.abs(fill(UNITS)), down=wide)


def attention_layer(fill: Fill) -> AttentionLayer:
    queries, kept = fill(64, HIDDEN), fill(32, HIDDEN)
    one = np.ones(HIDDEN, np.float32)
    return AttentionLayer(norm=one, q=queries, k=kept, v=kept, o=fill(HIDDEN, 64))


def two_layers(fill: Fill) -> TwoLayers:
    one = np.ones(HIDDEN, np.float32)
    return TwoLayers(norm=one, inner=fill(RANK, HIDDEN), outer=fill(UNITS, RANK))


def svd_layer(fill: Fill) -> SvdLayer:
    inner, outer = fill(RANK, HIDDEN), fill(UNITS, RANK)
    return SvdLayer(
        norm=np.ones(HIDDEN, np.float32),
        gate_inner=inner,
        gate_outer=outer,
        up_inner=inner,
        up_outer=outer,
        down_norm=np.abs(fill(UNITS)),
    )


SHAPE = AttentionShape(heads=4, kv_heads=2, head_dim=16, rope_theta=1e4, context=32)
SIGHT = replace(SHAPE, heads=1, kv_heads=1)


def farsight(fill: Fill) -> bytes:
    one = np.ones(16, np.float32)
    square = fill(16, 16)
    block = FarsightBlock(
        attn_norm=one, q=square, k=square, v=square, o=square, ffn_norm=one, gate=square,
        up=square, down=square,
    )  # fmt: skip
    body = FarsightBody(np.ones(HIDDEN, np.float32), fill(16, HIDDEN), (block,), one)
    heads = layers(lambda: FarsightHead(fill(UNITS, 16), None))
    return encode_farsight(NAME, body, heads, SIGHT, rms_eps=EPS)


FILES: dict[ProgramKind, Callable[[Fill], bytes]] = {
    ProgramKind.FREQUENCY: lambda f: encode_frequency(NAME, layers(lambda: f(UNITS))),
    ProgramKind.WINDOW: lambda f: encode_window(
        NAME, layers(lambda: f(UNITS)), tokens=4, decay=1.0
    ),
    ProgramKind.LOWRANK: lambda f: encode_lowrank(NAME, layers(lambda: two_layers(f)), rms_eps=EPS),
    ProgramKind.MLP: lambda f: encode_mlp(NAME, layers(lambda: two_layers(f)), rms_eps=EPS),
    ProgramKind.SVD: lambda f: encode_svd(NAME, layers(lambda: svd_layer(f)), rms_eps=EPS),
    ProgramKind.SHADOW: lambda f: encode_shadow(
        NAME, layers(lambda: shadow_layer(f)), bits=4, group=GROUP, rms_eps=EPS
    ),
    ProgramKind.ROLLOUT: lambda f: encode_rollout(
        NAME,
        layers(lambda: RolloutLayer(attention_layer(f), shadow_layer(f))),
        SHAPE,
        bits=4,
        group=GROUP,
        rms_eps=EPS,
    ),
    ProgramKind.FARSIGHT: farsight,
    ProgramKind.GATE: lambda f: encode_gate(
        NAME,
        layers(lambda: GateLayer(np.ones(HIDDEN, np.float32), f(10, HIDDEN))),
        rms_eps=EPS,
    ),
    ProgramKind.ORACLE: lambda f: encode_oracle(NAME, layers(lambda: np.abs(f(UNITS)))),
    ProgramKind.PLANTED: lambda f: encode_planted(
        NAME, layers(lambda: np.abs(f(UNITS))), seed=0, overlap=0.5, width=HIDDEN, rank=RANK
    ),
}


def test_every_kind_is_here() -> None:
    assert set(FILES) == set(ProgramKind)


@pytest.mark.parametrize("fill", FILLS)
def test_exact_is_exact_beside_any_programs(lab, tokens_of, greedy, fill: str) -> None:
    lab.packed(NAME)
    for number, kind in enumerate(FILES):
        lab.drive.load_program(number, FILES[kind](FILLS[fill]))
    assert sum(entry["active"] for entry in lab.drive.programs()) == len(FILES)
    model, dense = lab.open(NAME, lab.budget(NAME, 0.2)), lab.zoo.dense(NAME)
    ids = tokens_of(lab, NAME, 6)
    assert greedy(model, ids, NEW) == greedy(dense, ids, NEW)
    with torch.inference_mode():
        for part in (ids, ids[:, :1]):
            found, expected = model(part).logits, dense(part).logits
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    tally = model.csd.tally
    assert (tally.predicted_units, tally.corrections, tally.program_ns) == (0, 0, 0)


# An oracle is fed activities, and a gate speaks for a mixture's experts.
GUIDES = [kind for kind in FILES if kind not in (ProgramKind.ORACLE, ProgramKind.GATE)]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("kind", GUIDES)
def test_a_kept_fraction_by_any_program_comes_to_an_end(
    lab, tokens_of, greedy, kind: ProgramKind, fill: str
) -> None:
    """Exactly so many units are chosen, and what follows on the drive is as if nothing had been."""
    lab.packed(NAME)
    lab.drive.load_program(3, FILES[kind](FILLS[fill]))
    model = lab.open(NAME, lab.budget(NAME, 0.0), 0.25, predictor=kind.value)
    (rows,) = greedy(model, tokens_of(lab, NAME, 6), NEW)
    assert len(rows) == NEW
    assert model.csd.tally.predicted_units == (NEW - 1) * LAYERS * UNITS // 4
    model.csd.close()
    exact, dense = lab.open(NAME, lab.budget(NAME, 0.2)), lab.zoo.dense(NAME)
    ids = tokens_of(lab, NAME, 6)
    assert greedy(exact, ids, 2) == greedy(dense, ids, 2)


@pytest.mark.parametrize("fill", FILLS)
def test_no_far_program_changes_a_token(lab, tokens_of, greedy, fill: str) -> None:
    """Whatever it says to bring, the near program's units are what counts, and all of them."""
    lab.packed(NAME)
    lab.drive.load_program(3, FILES[ProgramKind.SHADOW](noise))
    ids, expected = tokens_of(lab, NAME, 6), None
    for far in (None, *GUIDES):
        if far is not None and far is not ProgramKind.SHADOW:
            lab.drive.load_program(4, FILES[far](FILLS[fill]))
        kind = "none" if far is None else f"{far.value}@2"
        model = lab.open(NAME, lab.budget(NAME, 0.0), 0.25, predictor="shadow", far=kind)
        rows = greedy(model, ids, NEW)
        assert rows == (expected or rows)
        expected = rows
        assert model.csd.no_far == (None if far is not None else "it was switched off")
        assert model.csd.tally.predicted_units == (NEW - 1) * LAYERS * UNITS // 4
        model.csd.close()


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("kind", [ProgramKind.SHADOW, ProgramKind.ROLLOUT])
def test_a_correction_that_is_no_number_is_a_status(
    lab, tokens_of, greedy, kind: ProgramKind, fill: str
) -> None:
    """A finite one may be as wrong as it likes: this is not the dense model's output."""
    lab.packed(NAME)
    lab.drive.load_program(3, FILES[kind](FILLS[fill]))
    model = lab.open(NAME, lab.budget(NAME, 0.0), "0.25+correct")
    status = None
    try:
        greedy(model, tokens_of(lab, NAME, 6), NEW)
    except CommandFailed as failed:
        status = failed.status
    assert status in (None, Status.INVALID_PROGRAM_DATA)
    model.csd.close()
    exact, dense = lab.open(NAME, lab.budget(NAME, 0.2)), lab.zoo.dense(NAME)
    ids = tokens_of(lab, NAME, 6)
    assert greedy(exact, ids, 2) == greedy(dense, ids, 2)
