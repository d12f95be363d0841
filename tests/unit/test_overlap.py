"""Overlap of host and drive: sets of time, made timelines, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from host_client.calibrate import overlap as ov
from host_client.calibrate.overlap_plot import write_overlap_plot
from host_client.cli.overlap_commands import overlap as command

SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=8).map(
    lambda found: [[float(start), float(start + length)] for start, length in found]
)
HOST, LINK, CHANNELS = 100, 5, 6


def ticks(spans: list[list[float]]) -> set[int]:
    return {tick for start, end in spans for tick in range(int(start), int(end))}


@given(SPANS, SPANS)
def test_sets_of_time(one: list[list[float]], other: list[list[float]]) -> None:
    a, b = ov.union(one), ov.union(other)
    assert ticks(a.tolist()) == ticks(one)
    assert (a[1:, 0] > a[:-1, 1]).all()
    assert ticks(ov.intersection(a, b).tolist()) == ticks(one) & ticks(other)
    assert ticks(ov.without(a, b).tolist()) == ticks(one) - ticks(other)
    assert ov.length_of(a) == len(ticks(one))


def span(pid: int, name: str, start: float, end: float) -> dict[str, Any]:
    return {"ph": "X", "pid": pid, "tid": 1, "name": name, "ts": start, "dur": end - start}


def page(*events: dict[str, Any], time: str = "wall") -> dict[str, Any]:
    names = {HOST: "host", LINK: "drive: link", CHANNELS: "drive: channels"}
    named = [
        {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": name}}
        for pid, name in names.items()
    ]
    return {"otherData": {"time": time, "spans_left_out": 0}, "traceEvents": [*named, *events]}


def four_tokens() -> list[dict[str, Any]]:
    return [span(HOST, f"token {number}", number * 100, number * 100 + 100) for number in range(4)]


def test_a_drive_that_is_the_shorter_one() -> None:
    found = ov.read_overlap(
        page(
            *four_tokens(),
            span(HOST, "wait for step 0", 200, 210),
            span(HOST, "read and check step 0", 205, 230),
            span(LINK, "to the host", 150, 215),  # 15 in the steady part, 5 of them computed in
            span(CHANNELS, "read", 300, 330),
            span(CHANNELS, "read", 310, 340),
            span(LINK, "to the host", 390, 450),  # goes on behind the last token
        )
    )
    assert (found.tokens, found.whole_us) == (2, 200)
    assert found.computing_us == 190
    assert found.drive_us == 15 + 40 + 10
    assert found.both_us == 5 + 40 + 10
    assert not found.is_drive_longer
    assert found.hidden == 55 / 65


def test_a_drive_that_is_the_longer_one() -> None:
    waits = [span(HOST, "wait for step 3", at, at + 80) for at in (200, 300)]
    found = ov.read_overlap(page(*four_tokens(), *waits, span(CHANNELS, "read", 0, 390)))
    assert found.is_drive_longer
    assert found.hidden == 30 / 40


@pytest.mark.parametrize(
    "refused, why",
    [
        (page(*four_tokens(), time="virtual"), "--time wall"),
        ({"otherData": {"time": "wall"}, "traceEvents": []}, "--time wall"),
        (page(*four_tokens()[:2]), "raise --max-new-tokens"),
        (
            {**page(*four_tokens()), "otherData": {"time": "wall", "spans_left_out": 3}},
            "lacks 3 spans",
        ),
    ],
)
def test_what_says_nothing_of_overlap_is_refused(refused: dict[str, Any], why: str) -> None:
    with pytest.raises(ov.NotATimeline, match=why):
        ov.read_overlap(refused)


def test_the_picture_and_the_figures(tmp_path: Path) -> None:
    drawn = page(*four_tokens(), span(CHANNELS, "read", 220, 260))
    write_overlap_plot(ov.read_overlap(drawn), tmp_path / "direct.png")
    (tmp_path / "t.json").write_text(json.dumps(drawn))
    app = typer.Typer()
    app.command()(command)
    told = CliRunner().invoke(
        app, [str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.png"), "--json"]
    )
    assert told.exit_code == 0, told.output
    figures = json.loads(told.stdout.splitlines()[-1])
    assert figures["hidden"] == 1.0
    assert figures["longer"] == "compute"
    assert np.isclose(figures["drive_ms"], 0.02)
    assert (tmp_path / "t.png").read_bytes() == (tmp_path / "direct.png").read_bytes()
    (tmp_path / "t.json").write_text("{")
    assert isinstance(
        CliRunner().invoke(app, [str(tmp_path / "t.json")]).exception, ov.NotATimeline
    )
