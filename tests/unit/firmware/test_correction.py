"""A correction's modelled time: its run on the engine, and what crosses the link both ways."""

import numpy as np
import pytest

from csd_device.clock import TimeMode
from csd_device.compute import CostModel, load_program
from csd_device.firmware import commands as c
from csd_protocol.program_file import ShadowLayer, encode_shadow
from csd_protocol.status import Status

HIDDEN, NEURONS, PROGRAM = 64, 96, 7
NOTHING = np.empty(0, np.uint32)


def corrector(down: float = 1.0) -> bytes:
    rng = np.random.default_rng(8)
    gate, up, rows = rng.standard_normal((3, NEURONS, HIDDEN)).astype(np.float32)
    layer = ShadowLayer(
        np.ones(HIDDEN, np.float32), gate, up, np.ones(NEURONS, np.float32), rows * down
    )
    return encode_shadow("m", {0: layer}, bits=3, group=32, rms_eps=1e-5)


def correct(hidden: np.ndarray, computed: np.ndarray = NOTHING) -> c.ExecuteProgram:
    return c.ExecuteProgram(
        PROGRAM, 1, 0, hidden, keep=0, wanted=c.Wanted.CORRECTION, units=computed
    )


@pytest.fixture
def timed_host(open_drive, make_host, packed):
    host = make_host(open_drive(TimeMode.VIRTUAL))
    host.pack(packed)
    host.load(PROGRAM, corrector())
    host.ok(correct(np.ones((1, HIDDEN), np.float32)))  # reads the model's tables
    return host


def test_a_correction_is_charged_to_engine_and_link(timed_host):
    config = timed_host.drive.config
    hidden, computed = np.ones((2, HIDDEN), np.float32), np.arange(30, dtype=np.uint32)
    completion = timed_host.ok(correct(hidden, computed))
    program = load_program(np.frombuffer(bytearray(corrector()), np.uint8))
    expected, cost = program.correct(0, hidden, computed)
    model = CostModel(config.compute.ops_per_s, config.dram.bandwidth_bytes_per_s)
    received, sent = hidden.nbytes + computed.nbytes, hidden.nbytes
    assert completion.timing.program_ns == model.duration_ns(cost)
    assert completion.timing.link_ns == sum(map(config.link.transfer_ns, (received, sent)))
    np.testing.assert_array_equal(completion.result.values, expected)
    assert completion.result.units.size == 0


def test_fewer_units_left_out_cost_less(timed_host):
    hidden = np.ones((1, HIDDEN), np.float32)
    times = [
        timed_host.ok(correct(hidden, np.arange(count, dtype=np.uint32))).timing.program_ns
        for count in (0, NEURONS // 2, NEURONS)
    ]
    assert times[0] > times[1] > times[2] == 0


def test_a_sum_that_is_not_finite_is_never_sent(timed_host):
    timed_host.load(PROGRAM, corrector(down=1e3))
    hidden = np.full((1, HIDDEN), 1e19, np.float32)
    completion = timed_host.run(correct(hidden))
    assert completion.status is Status.INVALID_PROGRAM_DATA
    assert "is not finite" in completion.detail
    timed_host.ok(correct(np.ones((1, HIDDEN), np.float32)))
