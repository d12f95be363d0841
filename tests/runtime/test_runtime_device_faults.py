"""Faults of the drive while a model runs: exact generation goes on, or ends with what was wrong."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers.generation.streamers import BaseStreamer

from csd_protocol.status import Status
from host_client.driver import CommandFailed

NAME = "tied"


class AtToken(BaseStreamer):
    """Does something once so many tokens are there, the prompt counting as one."""

    def __init__(self, tokens: int, act: Callable[[], None]) -> None:
        self._left, self._act = tokens, act

    def put(self, value: Any) -> None:
        self._left -= 1
        if self._left == 0:
            self._act()

    def end(self) -> None:
        pass


def expected(lab: Any, ids: Any, greedy: Any) -> list[list[int]]:
    return greedy(lab.zoo.dense(NAME), ids, new=8)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("refused", [1, 4])
def test_a_window_that_goes_away_and_comes_back_changes_no_token(
    make_lab, tokens_of, greedy, share: float, refused: int
) -> None:
    lab = make_lab()
    model = lab.open(NAME, lab.budget(NAME, share))
    ids = tokens_of(lab, NAME, 5)
    lose = AtToken(3, lambda: lab.drive.set_faults("window_loss", {"staging_commands": refused}))
    assert greedy(model, ids, new=8, streamer=lose) == expected(lab, ids, greedy)
    assert lab.drive.faults()["window_loss"] is None
    model.csd.close()
    assert lab.leases == 0


def test_a_window_that_stays_away_is_said(
    make_lab, tokens_of, greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("host_client.driver.queue_pair._WINDOW_RETRIES_MAX", 3)
    lab = make_lab()
    model = lab.open(NAME, lab.budget(NAME, 0.0))
    ids = tokens_of(lab, NAME, 5)
    lose = AtToken(3, lambda: lab.drive.set_faults("window_loss", {}))
    with pytest.raises(CommandFailed, match="the drive's window is gone") as error:
        greedy(model, ids, new=8, streamer=lose)
    assert error.value.status is Status.WINDOW_UNAVAILABLE
    lab.drive.clear_faults()
    assert greedy(model, ids, new=8) == expected(lab, ids, greedy)


def test_read_retries_cost_time_and_no_token(make_lab, tokens_of, greedy) -> None:
    """The same commands with and without: what the stage log says NAND took, and the tokens."""
    lab = make_lab()
    model = lab.open(NAME, lab.budget(NAME, 0.0))
    ids = tokens_of(lab, NAME, 5)
    clean = greedy(model, ids, new=8)
    nand_ns = lab.drive.log_page(0xC0)["totals"]["nand_ns"]
    greedy(model, ids, new=8)
    clean_ns = lab.drive.log_page(0xC0)["totals"]["nand_ns"] - nand_ns
    lab.drive.set_faults("bit_errors", {"rate": 1.2e-2})
    assert greedy(model, ids, new=8) == clean == expected(lab, ids, greedy)
    retried_ns = lab.drive.log_page(0xC0)["totals"]["nand_ns"] - nand_ns - clean_ns
    assert retried_ns > 1.5 * clean_ns
    assert lab.drive.faults()["counters"]["retried_sectors"] > 500


def test_an_uncorrectable_rate_says_which_blocks(make_lab, tokens_of, greedy) -> None:
    lab = make_lab()
    model = lab.open(NAME, lab.budget(NAME, 0.0))
    ids = tokens_of(lab, NAME, 5)
    lab.drive.set_faults("bit_errors", {"rate": 0.3})
    with pytest.raises(CommandFailed, match=r"2/81h.*LBAs? \d+.*physical sector") as error:
        greedy(model, ids, new=8)
    assert error.value.status is Status.UNRECOVERED_READ
    model.csd.close()
    lab.drive.clear_faults()
    model = lab.open(NAME, lab.budget(NAME, 0.0))
    assert greedy(model, ids, new=8) == expected(lab, ids, greedy)
