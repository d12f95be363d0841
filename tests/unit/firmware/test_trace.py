"""A trace of real work: valid, without overlaps, and with parts that add up."""

import json
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest

from csd_device.clock import TimeMode
from csd_device.config import load_config
from csd_device.firmware import commands as c
from csd_protocol.opcodes import Feature, LogPage
from csd_protocol.packed import Role
from csd_protocol.status import Status

BLOCK = 4096
SERIAL = {"drive: firmware", "drive: compute engine", "drive: DRAM", "drive: link",
          "drive: channels", "drive: dies"}  # fmt: skip
PARTS = ("queue_ns", "program_ns", "nand_ns", "dram_ns", "link_ns")


def read_trace(host, piece: int = 1 << 16) -> dict:
    page = b""
    while True:
        part = host.ok(c.GetLogPage(LogPage.TRACE, len(page), piece)).result.data
        page += part
        if len(part) < piece:
            return json.loads(page)


def busy_drive(host, packed) -> None:
    """Writes, reads in between, staging and releases; several commands at once."""
    at_ns = host.drive.clock.now_ns()
    rng = np.random.default_rng(1)
    for cid in range(40):
        slba = 2000 + int(rng.integers(0, 500))
        write = c.Write(slba, bytes(16 * BLOCK))
        read = c.Read(c.BlockRange(2000 + int(rng.integers(0, 500)), 16))
        host.queue.submit(500 + cid, write if cid % 3 else read, at_ns + cid * 5_000)
        if cid % 8 == 0:
            host.queue.pop_due(1 << 62)
    host.queue.pop_due(1 << 62)
    ffn = [packed.find(Role.FFN, layer) for layer in range(2)]
    hidden = np.ones((1, 64), np.float32)
    targets = tuple(c.Target(site, c.What.KEEP, keep=0.5) for site in ffn)
    staged = host.ok(c.PredictAndStage(1, 1, 0, hidden, targets[:1])).result
    host.ok(c.Stage(1, tuple(c.Target(site, c.What.ALL) for site in ffn)))
    host.ok(c.Release((staged.sites[0].lease,)))
    host.run(c.Read(c.BlockRange(0, 0)))


@pytest.fixture
def traced(open_drive, make_host, packed, shadow):
    config = load_config("tiny")
    timing = load_config("edge-gen5").timing  # cache reads, read priority, suspends
    drive = open_drive(TimeMode.VIRTUAL, config.model_copy(update={"timing": timing}))
    host = make_host(drive)
    host.pack(packed)
    host.load(1, shadow)
    host.ok(c.SetFeatures(Feature.TRACE, 100_000))
    busy_drive(host, packed)
    host.ok(c.SetFeatures(Feature.TRACE, 0))
    return host


def named(events: list[dict], kind: str) -> dict:
    keys = {"process_name": lambda e: e["pid"], "thread_name": lambda e: (e["pid"], e["tid"])}
    return {
        keys[kind](event): event["args"]["name"]
        for event in events
        if event["ph"] == "M" and event["name"] == kind
    }


def spans_by_track(events: list[dict]) -> dict[tuple[int, int], list[tuple[int, int, dict]]]:
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            start = round(event["ts"] * 1000)
            end = start + round(event["dur"] * 1000)
            tracks[event["pid"], event["tid"]].append((start, end, event))
    return {key: sorted(spans, key=lambda s: (s[0], -s[1])) for key, spans in tracks.items()}


def test_resources_serve_one_thing_at_a_time(traced):
    events = read_trace(traced)["traceEvents"]
    processes = named(events, "process_name")
    seen = set()
    for (pid, _), spans in spans_by_track(events).items():
        if processes[pid] in SERIAL:
            seen.add(processes[pid])
            for before, after in pairwise(spans):
                assert before[1] <= after[0], (processes[pid], before, after)
    assert seen == SERIAL


def test_the_parts_of_a_command_fill_it(traced):
    tracks = spans_by_track(read_trace(traced)["traceEvents"])
    commands = 0
    for (pid, _), spans in tracks.items():
        if pid != 1:
            continue
        last_end = 0
        for start, end, event in spans:
            if "args" not in event:
                continue
            commands += 1
            assert start >= last_end  # one command at a time in a slot
            parts = [s for s in spans if "args" not in s[2] and start <= s[0] and s[1] <= end]
            assert sum(stop - begin for begin, stop, _ in parts) == end - start
            assert sum(event["args"].get(part, 0) for part in PARTS) == end - start
            last_end = end
    assert commands == 40 + 5


def test_commands_say_what_their_completions_said(open_drive, make_host):
    host = make_host(open_drive(TimeMode.VIRTUAL))
    host.ok(c.SetFeatures(Feature.TRACE, 1000))
    timing = host.ok(c.Write(0, bytes(8 * BLOCK), fua=True)).timing
    host.ok(c.SetFeatures(Feature.TRACE, 0))
    events = read_trace(host)["traceEvents"]
    write = next(event for event in events if event["name"] == "Write")
    assert write["ts"] * 1000 == pytest.approx(timing.submitted_ns)
    assert write["dur"] * 1000 == pytest.approx(timing.done_ns - timing.submitted_ns)
    said = {part: getattr(timing, part) for part in PARTS if getattr(timing, part)}
    assert {part: write["args"][part] for part in said} == said
    kinds = {(event["name"], event["pid"]) for event in events if event["ph"] == "X"}
    assert ("program", 7) in kinds  # a die


def test_leases_open_and_close(traced):
    events = [e for e in read_trace(traced)["traceEvents"] if e.get("cat") == "lease"]
    begun = [event["id"] for event in events if event["ph"] == "b"]
    ended = [event["id"] for event in events if event["ph"] == "e"]
    assert len(begun) == len(set(begun)) == 3
    assert len(ended) == 1
    assert set(ended) < set(begun)
    counted = [e["args"]["bytes"] for e in read_trace(traced)["traceEvents"] if e["ph"] == "C"]
    sizes = {event["id"]: event["args"]["bytes"] for event in events if event["ph"] == "b"}
    assert counted[-1] == sum(sizes.values()) - sizes[ended[0]]


def test_modelled_times_are_the_same_with_and_without(open_drive, make_host, packed, shadow):
    def run(trace: bool) -> list[c.Timing]:
        drive = open_drive(TimeMode.VIRTUAL)
        host = make_host(drive)
        host.pack(packed)
        if trace:
            host.ok(c.SetFeatures(Feature.TRACE, 10_000))
        at_ns = drive.clock.now_ns() + 10**6
        for cid in range(20):
            command = c.Write(cid, bytes(BLOCK)) if cid % 2 else c.Read(c.BlockRange(cid, 8))
            host.queue.submit(cid, command, at_ns)
        timings = [done.timing for done in host.queue.pop_due(1 << 62)]
        host.ok(c.Format(0))
        drive.close()
        shift = at_ns
        return [
            c.Timing(t.submitted_ns - shift, t.done_ns - shift, t.queue_ns, t.program_ns,
                     t.nand_ns, t.dram_ns, t.link_ns)
            for t in timings
        ]  # fmt: skip

    assert run(trace=False) == run(trace=True)


def test_what_has_no_room_is_counted(open_drive, make_host):
    host = make_host(open_drive(TimeMode.VIRTUAL))
    host.ok(c.SetFeatures(Feature.TRACE, 10))
    for _ in range(10):
        host.ok(c.Write(0, bytes(BLOCK), fua=True))
    page = read_trace(host)
    kept = sum(event["ph"] in "Xb" and "args" in event for event in page["traceEvents"])
    assert kept <= 10
    assert page["otherData"]["spans_left_out"] > 0


def test_with_time_off_there_is_nothing_to_trace(host):
    refused = host.run(c.SetFeatures(Feature.TRACE, 1000))
    assert refused.status is Status.INVALID_FIELD
    assert "time is off" in refused.detail
    assert host.run(c.GetLogPage(LogPage.TRACE)).status is Status.INVALID_FIELD


def test_a_page_that_was_never_begun_and_an_offset_beyond_it(open_drive, make_host):
    host = make_host(open_drive(TimeMode.VIRTUAL))
    assert host.run(c.GetLogPage(LogPage.TRACE)).status is Status.SEQUENCE_ERROR
    assert host.run(c.GetLogPage(LogPage.SMART, 1 << 30)).status is Status.INVALID_FIELD
