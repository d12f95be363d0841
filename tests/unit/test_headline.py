"""The headline table by configs alone: every row has a plan, at every width of units."""

from pathlib import Path

import pytest

from csd_protocol.packed import Bits
from csd_protocol.units import GIB, MIB
from host_client.calibrate.headline import (
    GB,
    RESERVE_BYTES,
    ROWS,
    Row,
    budget_within,
    model_row,
    rows_of,
)
from host_client.calibrate.headline_plot import Bars, write_headline_plot
from host_client.model.errors import ModelNotFound
from host_client.model.synthetic import shape_names
from host_client.runtime.memory_limit import ALLOWANCE_BYTES, allowed, available_bytes
from host_client.runtime.quality import Quality

HOST_BYTES_PER_S = 20e9


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.shape)
def test_every_row_has_a_plan_within_its_budget(row: Row, bits: Bits) -> None:
    found = model_row(row, bits, 0.1, 16, HOST_BYTES_PER_S)
    exact, active = found.outlooks
    assert found.plan.total_bytes <= found.plan.budget_bytes < found.packed.weights_bytes
    assert (exact.quality, active.quality) == (Quality(), Quality(0.1))
    assert exact.staged_bytes_per_token == pytest.approx(found.plan.staged_bytes_per_token)
    assert 0 < active.staged_bytes_per_token < exact.staged_bytes_per_token
    for outlook in found.outlooks:
        rates = [time.tokens_per_s for time in outlook.times]
        assert rates == sorted(rates, reverse=True)  # cloud, edge, end


def test_the_rows_are_the_shapes_that_come_along() -> None:
    assert sorted(row.shape for row in ROWS) == shape_names()


def test_another_shape_has_a_budget_of_the_same_share(tmp_path: Path) -> None:
    named, other = rows_of(["llama3-8b", "no-such-shape"])
    assert named is ROWS[0]
    assert (other.title, other.conventional_bytes) == (None, None)
    packed = model_row(named, 16, 0.1, 16, HOST_BYTES_PER_S).packed
    share = other.budget_bytes(packed, 16) / packed.weights_bytes
    assert share == pytest.approx(5 / 16)
    with pytest.raises(ModelNotFound, match="no-such-shape"):
        other.open()


def test_a_budget_leaves_room_for_the_allowance_and_everybody_else() -> None:
    beside = allowed(0, 5 * GB) + RESERVE_BYTES
    assert budget_within(5 * GB, 24 * GIB) == 5 * GB
    assert budget_within(5 * GB, 3 * GIB) == 3 * GIB - beside
    assert budget_within(5 * GB, GIB) == 0


def test_libraries_that_take_more_are_allowed_more() -> None:
    assert allowed(0, 0) == allowed(290 * MIB, 0) == ALLOWANCE_BYTES
    behind = allowed(GIB, 0) - GIB  # what is left for everything that comes with the weights
    assert allowed(ALLOWANCE_BYTES, 0) == ALLOWANCE_BYTES + behind
    assert 128 * MIB < behind < ALLOWANCE_BYTES
    assert allowed(0, 24 * GIB) == ALLOWANCE_BYTES + 48 * MIB  # page tables


def test_available_memory_is_the_kernels(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:   2048 kB\n")
    assert available_bytes(file) == 2 << 20
    file.write_text("MemTotal: 99 kB\n")
    with pytest.raises(OSError, match="MemAvailable"):
        available_bytes(file)


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "headline.png"
    write_headline_plot([Bars("a", 16 * GB, 5 * GB, None), Bars("b", 87 * GB, 24 * GB, 9)], path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
