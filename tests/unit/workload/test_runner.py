"""Closed loops: the equations of docs/TIMING.md, determinism, shares, ends and refusals."""

from dataclasses import replace

import numpy as np
import pytest

from csd_device.workload.patterns import Job, Requests, WorkloadRefused, Zipf
from csd_device.workload.report import Meter, outcome_json, total_of
from csd_device.workload.runner import age, run_jobs
from tests.unit.workload.conftest import Opened, dice, iops, quiet, run_alone

KIB = 1024
READS = Job("reads", 1.0, True, 4 * KIB, 1, requests=500)


def test_depth_1_reads_take_the_sum_of_their_parts(filled: Opened) -> None:
    drive, length = filled("reference", 0.05)
    outcome = run_alone(drive, replace(READS, length_bytes=length))
    assert outcome.reads.latencies.mean_ns == pytest.approx(290 + 60_000 + 4_096 + 624, rel=0.005)
    assert outcome.reads.bytes == 500 * 4 * KIB


def test_saturated_reads_stay_between_the_reference_and_the_bus(filled: Opened) -> None:
    drive, length = filled("reference", 0.1)
    meter = Meter(drive)
    job = replace(READS, size_bytes=16 * KIB, depth=256, requests=40_000, length_bytes=length)
    outcome = run_alone(drive, job)
    assert 247_653 < iops(outcome) < 8 / (290e-9 + 16_384e-9)
    usage = meter.read()
    of_the_bus = iops(outcome) * (290e-9 + 16_384e-9) / 8
    assert usage.channels.mean() == pytest.approx(of_the_bus, rel=0.005)
    assert usage.dies.mean() <= 1
    assert usage.write_amplification is None


def test_large_sequential_reads_are_bound_by_the_link(filled: Opened) -> None:
    drive, length = filled("reference", 0.1)
    job = Job("seq", 1.0, False, 1 << 20, 8, length_bytes=length, requests=2_000)
    assert iops(run_alone(drive, job)) == pytest.approx(6_260, rel=0.005)


def test_a_seed_replays_a_run_and_another_does_not(filled: Opened) -> None:
    job = Job("mixed", 0.7, True, 16 * KIB, 8, requests=400)
    told = []
    for share, seed in ((0.5, 1), (0.501, 1), (0.502, 2)):  # folders of their own
        drive, _ = filled("tiny", share)
        told.append(outcome_json(run_alone(drive, replace(job, seed=seed, length_bytes=512 << 20))))
    assert told[0] == told[1]
    assert told[0] != told[2]


def test_reads_through_a_queue_pair_take_as_long_as_in_batches(filled: Opened) -> None:
    job = replace(READS, requests=300, depth=16)
    alone = []
    for share, others in ((0.5, []), (0.501, [Job("late", 0.0, True, 4 * KIB, 1, requests=0)])):
        drive, _ = filled("tiny", share)
        outcomes = run_jobs(drive, [replace(job, length_bytes=512 << 20), *others], dice, quiet)
        alone.append(outcome_json(outcomes[0]))
    assert alone[0] == alone[1]


def test_a_mix_has_its_share_and_its_parts_add_up(filled: Opened) -> None:
    drive, length = filled("tiny", 0.5)
    mixed = Job("mixed", 0.7, True, 8 * KIB, 4, length_bytes=length, requests=1_000)
    other = Job("other", 0.0, False, 16 * KIB, 2, length_bytes=length, requests=100, seed=2)
    outcomes = run_jobs(drive, [mixed, other], dice, quiet)
    assert outcomes[0].reads.latencies.count == pytest.approx(700, abs=50)
    assert [outcome.requests for outcome in outcomes] == [1_000, 100]
    assert not outcomes[1].reads.latencies.count
    total = total_of(outcomes)
    assert total.requests == 1_100
    assert total.writes.bytes == outcomes[0].writes.bytes + 100 * 16 * KIB


@pytest.mark.parametrize("read_share", [1.0, 0.5])
def test_a_run_ends_with_its_time(filled: Opened, read_share: float) -> None:
    drive, length = filled("tiny", 0.3)
    job = Job("timed", read_share, True, 4 * KIB, 4, length_bytes=length, duration_ns=3_000_000)
    outcome = run_alone(drive, job)
    assert 3_000_000 <= outcome.ended_ns < 3_500_000
    assert outcome.requests > 100


def test_aging_overwrites_and_leaves_the_amount_of_data(filled: Opened) -> None:
    drive, length = filled("tiny", 0.1)
    written = drive.ftl_counters().sectors_written
    age(drive, length, 0.5, 16 * KIB, dice, quiet)
    assert drive.used_bytes == length
    assert drive.ftl_counters().sectors_written - written == pytest.approx(length / 8192, rel=0.01)


def test_random_overwrites_of_a_full_drive_amplify_writes(filled: Opened) -> None:
    drive, length = filled("tiny", 1.0)
    meter = Meter(drive)
    job = Job("steady", 0.0, True, 64 * KIB, 8, length_bytes=length, requests=4_000)
    run_alone(drive, job)
    usage = meter.read()
    assert usage.write_amplification is not None
    assert usage.write_amplification > 1.05
    assert usage.superblocks_erased > 10


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size_bytes": 5000}, "size_bytes 5000 is no multiple of 4096"),
        ({"size_bytes": 2 << 20}, "at most 1.0 MiB in one command"),
        ({"depth": 0}, "depth 0"),
        ({"requests": None}, "neither a number of requests nor a time"),
        ({"offset_bytes": 1 << 40}, "does not fit a namespace"),
        ({"zipf_theta": 1.0}, "theta is above 0 and not 1"),
    ],
)
def test_jobs_that_cannot_be_run_are_refused(change: dict, message: str) -> None:
    with pytest.raises(WorkloadRefused, match=message):
        replace(READS, **change).check(1 << 30, 1 << 20)


def test_sequential_requests_go_round_reads_and_writes_each_on_their_own() -> None:
    job = replace(READS, is_random=False, read_share=0.5, offset_bytes=8 * KIB, requests=9)
    job = replace(job, length_bytes=16 * KIB)
    slbas, reads = Requests(job, 1 << 30, dice).take(9)
    for kind in (False, True):
        mine = slbas[reads == kind]
        assert mine.tolist() == [2 + at % 4 for at in range(mine.size)]


@pytest.mark.parametrize("theta", [0.6, 1.2])
def test_zipf_gives_the_first_ranks_their_share(theta: float) -> None:
    places = 1_000
    drawn = Zipf(places, theta).places(np.random.default_rng(3).random(200_000))
    counts = np.sort(np.bincount(drawn, minlength=places))[::-1] / drawn.size
    weights = np.arange(1, places + 1) ** -theta
    assert counts[:2] == pytest.approx(weights[:2] / weights.sum(), rel=0.05)
    assert counts[:100].sum() == pytest.approx(weights[:100].sum() / weights.sum(), rel=0.08)
    assert drawn.max() < places
