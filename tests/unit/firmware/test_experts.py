"""Mixtures: of a command's targets those of the experts that a gate finds likeliest are staged."""

import json

import numpy as np
import pytest

from csd_device.clock import TimeMode
from csd_device.compute import load_program
from csd_device.firmware import commands as c
from csd_protocol.packed import Role
from csd_protocol.program_file import (
    GateLayer,
    ShadowLayer,
    encode_frequency,
    encode_gate,
    encode_shadow,
)
from csd_protocol.status import Status

HIDDEN, NEURONS, EXPERTS, LAYERS = 64, 96, 4, 2
GATE, CONSTANT, SHADOW = 3, 4, 5


def gate() -> bytes:
    rng = np.random.default_rng(11)
    layers = {
        layer: GateLayer(
            np.ones(HIDDEN, np.float32), rng.standard_normal((EXPERTS, HIDDEN), np.float32)
        )
        for layer in range(LAYERS)
    }
    return encode_gate("m", layers, rms_eps=1e-5)


def constant(best: int) -> bytes:
    """Experts by a fixed order, `best` first."""
    counts = {layer: np.arange(EXPERTS) == best for layer in range(LAYERS)}
    return encode_frequency("m", counts, role=Role.ROUTER)


def shadow() -> bytes:
    rng = np.random.default_rng(12)
    layers = {
        number: ShadowLayer(
            np.ones(HIDDEN, np.float32),
            rng.standard_normal((NEURONS, HIDDEN), np.float32),
            rng.standard_normal((NEURONS, HIDDEN), np.float32),
            np.ones(NEURONS, np.float32),
        )
        for number in range(LAYERS * EXPERTS)
    }
    return encode_shadow("m", layers, bits=4, group=32, rms_eps=1e-5)


def hidden_state() -> np.ndarray:
    return np.random.default_rng(13).standard_normal((1, HIDDEN), np.float32)


def expert_sites(packed, layer: int) -> list[int]:
    return [site.site for site in packed.manifest.ffns(layer)]


def predict(targets, experts: c.TopExperts | None, program: int = GATE) -> c.PredictAndStage:
    return c.PredictAndStage(1, program, 0, hidden_state(), tuple(targets), experts=experts)


def all_of(sites: list[int]) -> list[c.Target]:
    return [c.Target(site, c.What.ALL) for site in sites]


@pytest.fixture
def mixture_host(open_drive, make_host, packed_mixture):
    host = make_host(open_drive(TimeMode.VIRTUAL))
    host.pack(packed_mixture)
    for number, data in ((GATE, gate()), (CONSTANT, constant(2)), (SHADOW, shadow())):
        host.load(number, data)
    return host


def top_experts(layer: int, count: int) -> set[int]:
    scores = load_program(np.frombuffer(bytearray(gate()), np.uint8)).score(layer, hidden_state())
    return set(np.argsort(-scores)[:count].tolist())


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_only_the_top_experts_are_staged(mixture_host, packed_mixture, count) -> None:
    sites = expert_sites(packed_mixture, 1)
    staged = mixture_host.ok(predict(all_of(sites), c.TopExperts(GATE, count))).result.sites
    assert [site.site for site in staged] == sites
    assert {n for n, site in enumerate(staged) if site.all_missing} == top_experts(1, count)
    for site in staged:
        assert site.unit_count == (NEURONS if site.all_missing else 0)
        assert bool(site.lease) == site.all_missing
        if site.all_missing:
            np.testing.assert_array_equal(
                mixture_host.window(site), packed_mixture.units[site.site]
            )


def test_the_gate_runs_once_a_layer_and_is_charged(mixture_host, packed_mixture) -> None:
    targets = all_of([*expert_sites(packed_mixture, 0), *expert_sites(packed_mixture, 1)])
    once = mixture_host.ok(predict(targets[:EXPERTS], c.TopExperts(GATE, 1))).timing.program_ns
    twice = mixture_host.ok(predict(targets, c.TopExperts(GATE, 1))).timing.program_ns
    assert once > 0
    assert twice == 2 * once


def test_within_an_expert_another_program_chooses_neurons(mixture_host, packed_mixture) -> None:
    sites = expert_sites(packed_mixture, 1)
    targets = [c.Target(site, c.What.KEEP, keep=0.25) for site in sites]
    staged = mixture_host.ok(predict(targets, c.TopExperts(GATE, 2), SHADOW)).result.sites
    program = load_program(np.frombuffer(bytearray(shadow()), np.uint8))
    for expert, site in enumerate(staged):
        if expert not in top_experts(1, 2):
            assert site.predicted.size == site.unit_count == 0
            continue
        scores = program.score(EXPERTS + expert, hidden_state())
        expected = np.sort(np.argsort(-scores, kind="stable")[: NEURONS // 4])
        assert site.predicted.tolist() == site.units.tolist() == expected.tolist()


def test_any_program_of_experts_can_choose_them(mixture_host, packed_mixture) -> None:
    targets = all_of(expert_sites(packed_mixture, 0))
    staged = mixture_host.ok(predict(targets, c.TopExperts(CONSTANT, 1))).result.sites
    assert [site.all_missing for site in staged] == [False, False, True, False]


def test_sites_of_no_expert_are_staged_all_the_same(mixture_host, packed_mixture) -> None:
    kv = packed_mixture.find(Role.KV, 0)
    staged = mixture_host.ok(predict(all_of([kv]), c.TopExperts(GATE, 1))).result.sites
    assert staged[0].unit_count == 1


@pytest.mark.parametrize(
    "experts, status",
    [
        (c.TopExperts(GATE, 0), Status.INVALID_FIELD),
        (c.TopExperts(SHADOW, 1), Status.INVALID_FIELD),
        (c.TopExperts(99, 1), Status.NO_PROGRAM),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(
    mixture_host, packed_mixture, experts, status
) -> None:
    completion = mixture_host.run(predict(all_of(expert_sites(packed_mixture, 0)), experts))
    assert completion.status is status
    assert json.loads(mixture_host.ok(c.Identify(0xC0)).result.data)["leases"] == 0


def test_a_dense_model_has_no_experts(staged_host, packed) -> None:
    staged_host.load(GATE, gate())
    ffn = packed.find(Role.FFN, 0)
    staged = staged_host.ok(predict(all_of([ffn]), c.TopExperts(GATE, 1))).result.sites
    assert staged[0].unit_count == NEURONS


def test_execute_program_names_experts(mixture_host) -> None:
    command = c.ExecuteProgram(GATE, 1, 1, hidden_state(), keep=0.5)
    assert set(mixture_host.ok(command).result.units.tolist()) == top_experts(1, 2)
