"""The host's timeline beside the drive's."""

import json
import time
from typing import Any

from csd_protocol.opcodes import LogPage
from host_client.driver import Timing
from host_client.runtime.generate import generate
from host_client.runtime.timeline import COMPUTE, HostTimeline


class Ticking:
    """A clock that moves a microsecond a look."""

    def __init__(self) -> None:
        self.now = 5_000_000

    def __call__(self) -> int:
        self.now += 1000
        return self.now


class Words:
    """As much of a tokenizer as a report needs."""

    eos_token_id = 0

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def recorded() -> HostTimeline:
    timeline = HostTimeline(Ticking())
    started = timeline.now_ns()
    timeline.note(COMPUTE, "wait for step 0", started)
    timeline.note_command([0, 1], started, Timing(submitted_ns=10, done_ns=900))
    return timeline


def host_events(time: str) -> list[dict]:
    page = {"otherData": {"time": time}, "traceEvents": [{"ph": "M", "pid": 1}]}
    combined = recorded().combined(page)
    assert combined["traceEvents"][0] == {"ph": "M", "pid": 1}
    return json.loads(json.dumps(combined["traceEvents"][1:]))


def test_in_virtual_time_the_host_has_a_clock_of_its_own() -> None:
    events = host_events("virtual")
    span = next(event for event in events if event["ph"] == "X")
    assert (span["ts"], span["dur"]) == (1.0, 1.0)
    assert events[0]["args"]["name"] == "host (a clock of its own)"


def test_in_wall_time_the_fastest_completion_joins_the_clocks() -> None:
    events = host_events("wall")
    end = next(event for event in events if event["ph"] == "e")
    assert end["ts"] == 0.9  # when the drive was done
    begin = next(event for event in events if event["ph"] == "b")
    assert begin["id"] == end["id"]
    assert begin["ts"] < end["ts"]


def test_a_generation_is_drawn_with_host_and_drive(lab, tokens_of) -> None:
    model = lab.open("tied", lab.budget("tied", 0.4))
    timeline = HostTimeline(time.perf_counter_ns)
    model.generation_config.min_new_tokens = 3
    with lab.drive.traced():
        generate(model, Words(), tokens_of(lab, "tied", 5), 3, time.perf_counter_ns, None, timeline)
    events = timeline.combined(lab.drive.log_page(LogPage.TRACE))["traceEvents"]
    of_host = [event for event in events if event["pid"] == 100]
    names = [event["name"] for event in of_host if event["ph"] == "X"]
    assert [name for name in names if name.startswith("token")] == ["token 0", "token 1", "token 2"]
    assert any(name.startswith("wait for step") for name in names)
    assert any(name.startswith("read and check step") for name in names)
    staged = [event for event in events if event["pid"] == 1 and event["name"] == "Stage"]
    begun = [event for event in of_host if event["ph"] == "b"]
    assert 0 < len(begun) <= len(staged)
    assert min(event["dur"] for event in of_host if event["ph"] == "X") >= 0
