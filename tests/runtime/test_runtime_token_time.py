"""The modelled token: closed forms, what bounds it, and that nothing is counted twice."""

from dataclasses import replace

import numpy as np
import pytest

from csd_protocol.opcodes import Cns
from csd_protocol.packed import Role
from host_client.runtime.plan import make_plan
from host_client.runtime.quality import Quality
from host_client.runtime.token_time import (
    CLASSES,
    LOW_BITS,
    Rates,
    Volumes,
    measure_host_rate,
    rates_of,
    token_time,
    volumes_of,
)
from tests.runtime.test_runtime_plan import manifest

EXACT, HALF = Quality(), Quality(0.5)
MODEL = manifest(64, 160, 4, 2, 300, tied=False)
EVEN = Rates("even", 1e9, 1e9, 1e12, 1e12, 0, 0)  # one ns a byte from NAND and over the link
FAST_HOST = 1e15


def layers(count: int, staged: float, host: float = 0.0, **programs: float) -> list[Volumes]:
    return [*[Volumes(staged, host, **programs)] * count, Volumes(0.0, 0.0)]


def test_a_sweep_takes_as_long_as_the_slowest_part_of_each_layer() -> None:
    link_bound = replace(EVEN, nand_bytes_per_s=2e9)
    time = token_time(layers(10, 1000.0), link_bound, FAST_HOST, None)
    assert (time.nand_ns, time.link_ns) == pytest.approx((5_000, 10_000))
    assert time.token_ns == pytest.approx(10_000)
    assert (time.bound, time.tokens_per_s) == ("link", pytest.approx(1e5))
    slow_host = token_time(layers(10, 1000.0, 9000.0), link_bound, 1e9, None)
    assert slow_host.token_ns == pytest.approx(10 * 10_000)
    assert slow_host.bound == "host"


def test_what_the_unit_cache_holds_does_not_come_from_nand() -> None:
    cached = replace(EVEN, unit_cache_bytes=7_500)
    time = token_time(layers(10, 1000.0), cached, FAST_HOST, None)
    assert time.nand_ns == pytest.approx(2_500)
    assert (
        token_time(layers(10, 1000.0), replace(EVEN, unit_cache_bytes=1 << 30), 1e9, 1).nand_ns == 0
    )


@pytest.mark.parametrize("lookahead, chains", [(0, 1), (1, 1), (2, 2), (4, 4)])
def test_a_guided_layer_waits_for_what_its_lookahead_does_not_cover(
    lookahead: int, chains: int
) -> None:
    late = replace(EVEN, latency_ns=8_000)
    volumes = layers(10, 1000.0, program_ops=2000.0 * 1000)
    time = token_time(volumes, late, FAST_HOST, lookahead)
    chain_ns, first_ns = 8_000 + 2_000 + 1_000 + 1_000, 8_000 + 1_000 + 1_000
    assert time.token_ns == pytest.approx(10 * chain_ns / chains + first_ns)
    assert time.compute_ns == pytest.approx(10 * 2_000)
    patient = token_time(volumes, late, 1e9 / 30, lookahead)  # 30 us a layer hide the chain
    assert patient.token_ns == pytest.approx(10 * 30_000, rel=0.05)
    assert patient.bound == "host"


def test_commands_that_wait_for_each_other_are_bound_by_latency() -> None:
    late = replace(EVEN, latency_ns=50_000)
    assert token_time(layers(10, 1000.0), late, FAST_HOST, 1).bound == "latency"


def test_volumes_are_those_of_the_plan() -> None:
    plan = make_plan(MODEL, make_plan(MODEL, 1 << 50, 64).total_bytes * 7 // 10, 64)
    volumes = volumes_of(MODEL, plan, EXACT)
    assert sum(step.staged_bytes for step in volumes) == plan.staged_bytes_per_token
    weights = MODEL.weights_bytes - MODEL.find(Role.EMBED).length_bytes
    weights -= MODEL.find(Role.FINAL_NORM).length_bytes
    assert sum(step.host_bytes for step in volumes) == weights
    assert all(step.program_ops == step.program_bytes == 0 for step in volumes)


def test_a_kept_fraction_stages_what_is_chosen_and_not_resident() -> None:
    plan = make_plan(MODEL, make_plan(MODEL, 1 << 50, 64).total_bytes * 7 // 10, 64)
    site = MODEL.find(Role.FFN, 0)
    resident = plan.resident_units[site.site]
    assert 0 < resident < site.count
    counts = np.zeros((4, site.count), np.uint32)
    counts[:, :resident] = 3  # three quarters of all that is wanted, if the rest is wanted once
    rest = site.count - resident
    counts[:, resident:] = 1
    found = 3 * resident / (3 * resident + rest)
    expected = min(rest, site.count * 0.5 * (1 - found))
    [first, *_] = volumes_of(MODEL, plan, HALF, counts)
    assert first.staged_bytes == pytest.approx(expected * site.unit_bytes)
    uniform = volumes_of(MODEL, plan, HALF)[0]
    assert uniform.staged_bytes == pytest.approx(min(rest, 0.5 * rest) * site.unit_bytes)
    assert first.program_bytes == pytest.approx(first.program_ops / 2 * LOW_BITS / 8)
    corrected = volumes_of(MODEL, plan, Quality(0.5, corrected=True))[0]
    more = corrected.program_ops - first.program_ops
    assert more == pytest.approx(2 * site.count * site.values)


def test_recent_units_count_as_more_resident_ones() -> None:
    plan = make_plan(MODEL, make_plan(MODEL, 1 << 50, 64).total_bytes * 7 // 10, 64)
    sites = [MODEL.find(Role.FFN, layer).site for layer in range(MODEL.layer_count)]
    fewer = {site: plan.resident_units[site] - 3 for site in sites}
    shared = replace(plan, recent_units=3, resident_units=plan.resident_units | fewer)
    counts = np.random.default_rng(0).integers(0, 99, (4, MODEL.find(Role.FFN, 0).count), np.uint32)
    assert volumes_of(MODEL, shared, HALF, counts) == volumes_of(MODEL, plan, HALF, counts)


def test_classes_are_ordered_and_a_drive_says_its_own(lab) -> None:
    volumes = volumes_of(MODEL, make_plan(MODEL, 400_000, 64), EXACT)
    times = [token_time(volumes, rates, FAST_HOST, None).token_ns for rates in CLASSES]
    assert times == sorted(times)
    rates = rates_of(lab.drive.identify(Cns.CONTROLLER))
    assert rates.name == "tiny"
    assert 0 < rates.link_bytes_per_s < 8e9
    assert rates.latency_ns > 0


def test_the_host_rate_is_a_rate() -> None:
    assert 1e7 < measure_host_rate() < 1e13
