"""A kept fraction: what the drive's program names, no more and no less, and how good that was."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from csd_protocol.packed import Role
from csd_protocol.program_file import encode_frequency
from host_client.calibrate.preparation import build_predictor
from host_client.driver import CommandFailed
from host_client.runtime.quality import Quality
from host_client.runtime.refusals import InvalidQuality, NoPredictor
from tests.runtime.decoding import PROMPT, decode

NAME, LAYERS, NEURONS = "tied", 4, 160
PROGRAM = 5
CLOSE = 1e-5
DECODED = 6


def top(scores: np.ndarray, kept: float) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[: math.ceil(kept * scores.size)]


def load(lab: Any, kind: str, seed: int = 0) -> None:
    """A shadow made of the weights, or a frequency program with any counts at all."""
    _, packed = lab.packed(NAME)
    if kind == "shadow":
        data = build_predictor(lab.drive, packed, "shadow", lambda done, total: None)
    else:
        rng = np.random.default_rng(seed)
        counts = {layer: rng.integers(0, 1000, NEURONS) for layer in range(LAYERS)}
        data = encode_frequency(NAME, counts)
    lab.drive.load_program(PROGRAM, data)


@dataclass
class Audit:
    """What an auditor should find: one layer a token, its wanted units against the chosen."""

    kept: float
    tokens: int
    wanted: int = 0
    in_time: int = 0
    chosen: list[np.ndarray] = field(default_factory=list)

    def note(self, layer: int, units: np.ndarray, scores: np.ndarray) -> None:
        self.chosen.append(units)
        if layer == self.tokens % LAYERS:
            best = top(scores, self.kept)
            self.wanted += best.size
            self.in_time += int(np.isin(best, units).sum())
        self.tokens += layer == LAYERS - 1


def by_program(lab: Any, runtime: Any, kept: float, audit: Audit) -> Any:
    """What the drive's program names for the same hidden state, and what is resident."""
    model_id, packed = lab.packed(NAME)

    def choose(layer: int, asked: np.ndarray, scores: np.ndarray) -> np.ndarray:
        resident = runtime.csd.engine.resident[packed.find(Role.FFN, layer).site]
        if not resident.missing.size:
            return resident.units
        units = lab.drive.execute_program(PROGRAM, model_id, layer, asked, kept).result()
        audit.note(layer, units, scores)
        return np.union1d(units, resident.units)

    return choose


@pytest.mark.parametrize(
    "kind, lookahead, share",
    [
        ("shadow", 0, 0.4),
        ("shadow", 1, 0.0),
        ("shadow", 1, 0.9),
        ("shadow", 2, 0.4),
        ("shadow", 9, 0.4),
        ("frequency", 0, 0.0),
        ("frequency", 1, 0.9),
    ],
)
@pytest.mark.parametrize("kept", [0.3, 0.77])
def test_the_logits_are_those_of_the_dense_model_with_the_rest_left_out(
    lab, far_from, tokens_of, masked_dense, kind, lookahead, share, kept
) -> None:
    load(lab, kind)
    audit = Audit(kept, PROMPT)
    settings = {"lookahead": lookahead, "audit": True, "recent": 0}
    model = lab.open(NAME, lab.budget(NAME, share), kept, **settings)
    choose = by_program(lab, model, kept, audit)
    masked = masked_dense(lab.zoo.dense(NAME), choose, lookahead).model
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    found, expected = decode(model, ids), decode(masked, ids)
    assert far_from(found, expected) <= CLOSE
    assert far_from(found[:, :PROMPT], decode(lab.zoo.dense(NAME), ids)[:, :PROMPT]) <= CLOSE
    assert far_from(found, decode(lab.zoo.dense(NAME), ids)) > 100 * CLOSE
    tally = model.csd.tally
    assert model.csd.predictor == kind
    assert tally.predicted_units == sum(units.size for units in audit.chosen)
    assert (tally.wanted_units, tally.wanted_in_time) == (audit.wanted, audit.in_time)
    assert tally.recall == audit.in_time / audit.wanted
    assert tally.covered >= tally.recall


@pytest.mark.parametrize("kept", [0.3, 0.77])
def test_what_is_resident_is_computed_and_asks_no_program(lab, far_from, tokens_of, kept) -> None:
    load(lab, "frequency")
    model = lab.open(NAME, lab.budget(NAME, 1.0), kept, audit=True)
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    assert far_from(decode(model, ids), decode(lab.zoo.dense(NAME), ids)) <= CLOSE
    assert (model.csd.tally.predicted_units, model.csd.tally.recall) == (0, None)


@pytest.mark.parametrize("quality", ["0.5", "0.2+correct"])
def test_an_audit_changes_nothing_but_what_is_staged(lab, tokens_of, quality) -> None:
    load(lab, "shadow")
    ids = tokens_of(lab, NAME, PROMPT + DECODED)
    plain = lab.open(NAME, lab.budget(NAME, 0.3), quality)
    logits = decode(plain, ids)
    assert plain.csd.tally.late_units == 0
    assert plain.csd.tally.recall is None
    staged = plain.csd.tally.staged_bytes
    plain.csd.close()
    audited = lab.open(NAME, lab.budget(NAME, 0.3), quality, audit=True)
    assert torch.equal(decode(audited, ids), logits)
    late = audited.csd.tally.late_units
    assert late > 0
    unit_bytes = audited.csd.packed.find(Role.FFN, 0).unit_bytes
    assert audited.csd.tally.staged_bytes == staged + late * unit_bytes


def test_only_the_chosen_that_are_not_resident_are_staged(lab, tokens_of) -> None:
    load(lab, "frequency")
    model_id, packed = lab.packed(NAME)
    model = lab.open(NAME, lab.budget(NAME, 0.9), 0.25)
    ids = tokens_of(lab, NAME, 1)
    with torch.inference_mode():
        model(ids)
        model.csd.engine.abandon()
        before = model.csd.tally.snapshot()
        model(ids)
        model.csd.engine.abandon()
    hidden = np.zeros((1, 64), np.float32)
    expected = 0
    for layer in range(LAYERS):
        chosen = lab.drive.execute_program(PROGRAM, model_id, layer, hidden, 0.25).result()
        entry = model.csd.engine.resident[packed.find(Role.FFN, layer).site]
        assert entry.units.size
        expected += int((entry.position[chosen] < 0).sum())
    assert expected
    assert model.csd.tally.since(before).units_staged == expected


@pytest.mark.parametrize("right", [True, False])
def test_recall_is_one_for_a_program_that_knows_and_none_for_one_that_lies(
    lab, tokens_of, masked_dense, right
) -> None:
    """Counts are the very scores of one token, or their opposites, in each layer."""
    for tokens in range(3, 3 + LAYERS):  # a shorter prompt would be one row
        ids = tokens_of(lab, NAME, tokens)
        counts: dict[int, np.ndarray] = {}

        def choose(layer: int, asked: np.ndarray, scores: np.ndarray, counts=counts) -> np.ndarray:
            counts[layer] = scores if right else -scores
            return top(counts[layer], 0.5)

        masked = masked_dense(lab.zoo.dense(NAME), choose, 0).model
        expected = decode(masked, ids, tokens - 1)
        lab.drive.load_program(PROGRAM, encode_frequency(NAME, counts))
        model = lab.open(NAME, lab.budget(NAME, 0.2), 0.5, audit=True, lookahead=0)
        assert torch.allclose(decode(model, ids, tokens - 1), expected, atol=1e-3)
        assert model.csd.tally.recall == (1.0 if right else 0.0)
        lab.put_back()


def test_a_shadow_of_the_weights_knows_better_than_chance(lab, tokens_of) -> None:
    """At lookahead 0 it sees nearly what the FFN sees, in four bits."""
    load(lab, "shadow")
    kept = 0.4
    recalls = []
    for lookahead in (0, 1):
        model = lab.open(NAME, lab.budget(NAME, 0.3), kept, audit=True, lookahead=lookahead)
        decode(model, tokens_of(lab, NAME, 24))
        recalls.append(model.csd.tally.recall)
        model.csd.close()
    assert recalls[0] > kept + 0.2
    assert recalls[0] > recalls[1] > kept + 0.05


def test_passes_over_several_rows_leave_nothing_out(lab, far_from, tokens_of) -> None:
    load(lab, "frequency")
    model, dense = lab.open(NAME, lab.budget(NAME, 0.3), 0.1), lab.zoo.dense(NAME)
    ids = tokens_of(lab, NAME, PROMPT + 2, batch=2)
    assert far_from(decode(model, ids), decode(dense, ids)) <= CLOSE


def test_guided_and_full_passes_alternate(lab, far_from, tokens_of) -> None:
    load(lab, "frequency")
    model, dense = lab.open(NAME, lab.budget(NAME, 0.3), 0.3), lab.zoo.dense(NAME)
    ids = tokens_of(lab, NAME, 4)
    with torch.inference_mode():
        first = model(ids[:, :1]).logits
        for _ in range(2):
            assert far_from(model(ids).logits, dense(ids).logits) <= CLOSE
            assert torch.equal(model(ids[:, :1]).logits, first)
            model.model(ids[:, :1])


def test_a_program_taken_away_fails_the_pass_and_nothing_else(lab, far_from, tokens_of) -> None:
    load(lab, "frequency")
    model, dense = lab.open(NAME, lab.budget(NAME, 0.3), 0.3), lab.zoo.dense(NAME)
    ids = tokens_of(lab, NAME, 4)
    lab.drive.activate_program(PROGRAM, active=False)
    with torch.inference_mode():
        with pytest.raises(CommandFailed, match="Program Not Activated"):
            model(ids[:, :1])
        assert far_from(model(ids).logits, dense(ids).logits) <= CLOSE
        lab.drive.activate_program(PROGRAM)
        assert model(ids[:, :1]).logits.isfinite().all()


# ---- who may choose, and what is no quality ----------------------------------------------------


def test_without_a_program_a_kept_fraction_is_refused(lab) -> None:
    lab.packed(NAME)
    with pytest.raises(NoPredictor, match=r"csd predictor build rollout tied.*--quality exact"):
        lab.open(NAME, "300%", 0.5)
    load(lab, "frequency")
    lab.drive.activate_program(PROGRAM, active=False)
    with pytest.raises(NoPredictor, match="none is active"):
        lab.open(NAME, "300%", 0.5)
    lab.drive.activate_program(PROGRAM)
    lab.open(NAME, "300%", 0.5)


def test_another_models_program_does_not_count(lab) -> None:
    lab.packed("untied")
    load(lab, "frequency")
    with pytest.raises(NoPredictor, match="untied"):
        lab.open("untied", "300%", 0.5)


def test_a_shadow_goes_before_a_frequency(lab) -> None:
    load(lab, "shadow")
    lab.drive.load_program(1, encode_frequency(NAME, dict.fromkeys(range(LAYERS), range(NEURONS))))
    assert lab.open(NAME, "300%", 0.5).csd.predictor == "shadow"
    lab.drive.activate_program(PROGRAM, active=False)
    assert lab.open(NAME, "300%", 0.5).csd.predictor == "frequency"


@pytest.mark.parametrize(
    "given, kept, shown",
    [
        ("exact", 1.0, "exact"),
        ("1.0", 1.0, "exact"),
        (1, 1.0, "exact"),
        ("0.5", 0.5, "0.5"),
        (0.25, 0.25, "0.25"),
        (Quality(0.3), 0.3, "0.3"),
        ("0.10+correct", 0.1, "0.1+correct"),
        ("0.5+correct+heads=.67", 0.5, "0.5+correct+heads=0.67"),
        ("0.5+heads=0.67+correct", 0.5, "0.5+correct+heads=0.67"),
        ("1+heads=0.5", 1.0, "1+heads=0.5"),
        ("1+heads=1.0", 1.0, "exact"),
        (Quality(0.5, corrected=True), 0.5, "0.5+correct"),
        ("0.5+heads=0.5+uniform", 0.5, "0.5+uniform+heads=0.5"),
    ],
)
def test_qualities(given: Any, kept: float, shown: str) -> None:
    quality = Quality.parse(given)
    assert quality.kept == kept
    assert quality.corrected == ("correct" in shown)
    assert quality.heads == (float(shown.split("heads=")[1]) if "heads" in shown else 1.0)
    assert Quality.parse(shown) == quality
    assert quality.exact == (shown == "exact")
    assert str(quality) == shown


@pytest.mark.parametrize(
    "given",
    [
        *["", "best", "0", "-0.5", "1.5", "nan", "inf", "50%", 0.0, -1],
        *["correct", "0.5+", "0.5+corrected", "0.5+correct+correct", "exact+correct"],
        *["1+correct", "0.5+heads", "0.5+heads=0", "0.5+heads=2", "0.5+heads=.5+heads=.5"],
        *["uniform", "1+uniform", "exact+uniform", "0.5+uniform+uniform"],
    ],
)
def test_what_is_no_quality_is_refused(lab, given: Any) -> None:
    with pytest.raises(InvalidQuality, match="neither 'exact' nor a kept fraction"):
        lab.open(NAME, "300%", given)
