"""What a running daemon tells of itself: metrics over HTTP, events, traces, and after a kill."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from csd_protocol.opcodes import Feature, LogPage
from host_client.cli.log_commands import write_trace
from host_client.cli.log_tables import TABLES
from host_client.driver import CommandFailed, Drive

DEADLINE_S = 60.0
BLOCK = 4096
OVER_AT_ONCE, NEVER_OVER = 273, 0xFFFF  # Kelvin


@dataclass(frozen=True)
class Served:
    """A daemon in virtual time, and where its metrics are."""

    process: subprocess.Popen[str]
    address: str
    metrics: str


def serve(folder: Path, time: str = "virtual") -> Served:
    address = f"unix:{folder / 'csd.sock'}"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "csd_device.service", "serve", "--drive", "tiny"),
            *("--media", str(folder / "d.csd"), "--listen", address, "--time", time),
            *("--metrics", "127.0.0.1:0", "--window", str(folder / "window")),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready:")
    return Served(process, address, process.stdout.readline().split()[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = serve(tmp_path_factory.mktemp("served"))
    yield served
    served.process.terminate()
    assert served.process.wait(DEADLINE_S) == 0


@pytest.fixture
def drive(served: Served) -> Iterator[Drive]:
    with Drive.connect(served.address) as connected:
        yield connected


def scrape(served: Served) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Samples by name: labels and value."""
    with urllib.request.urlopen(served.metrics, timeout=DEADLINE_S) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = answer.read().decode()
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


def value_of(samples: dict[str, list[tuple[dict[str, str], float]]], name: str) -> float:
    ((_, value),) = samples[name]
    return value


def test_metrics_follow_the_drive(served: Served, drive: Drive) -> None:
    before = scrape(served)
    drive.write(0, bytes(64 * BLOCK))
    drive.flush()
    drive.read(0, 64 * BLOCK)
    after = scrape(served)
    grown = {
        name: value_of(after, name) - value_of(before, name)
        for name in ("csd_written_bytes_total", "csd_read_bytes_total")
    }
    assert set(grown.values()) == {64.0 * BLOCK}
    assert value_of(after, "csd_busy_seconds_total") > value_of(before, "csd_busy_seconds_total")
    assert value_of(after, "csd_temperature_celsius") >= 35
    dram = {labels["name"]: size for labels, size in after["csd_dram_bytes"]}
    assert dram["window"] == drive.window_bytes
    assert {labels["host"] for labels, _ in after["csd_queue_depth"]} >= {drive.host_id}
    assert sum(value for _, value in after["csd_die_busy_seconds_total"]) > 0
    writes = [
        (labels["le"], count)
        for labels, count in after["csd_command_seconds_bucket"]
        if labels["command"] == "Write"
    ]
    counts = [count for _, count in writes]
    assert counts == sorted(counts)
    assert writes[-1] == ("+Inf", value_of(after, "csd_host_write_commands_total"))


def test_metrics_are_at_one_place(served: Served) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(served.metrics + "x", timeout=DEADLINE_S)
    assert refused.value.code == 404
    request = urllib.request.Request(served.metrics, data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=DEADLINE_S)
    assert refused.value.code == 405


def test_a_host_waits_for_an_event(drive: Drive) -> None:
    drive.log_page(LogPage.SMART)
    assert drive.wait_event(0.05) is None
    told = []
    waiting = threading.Thread(target=lambda: told.append(drive.wait_event(DEADLINE_S)))
    waiting.start()
    drive.set_feature(Feature.TEMPERATURE_THRESHOLD, OVER_AT_ONCE)
    waiting.join(DEADLINE_S)
    (event,) = told
    assert str(event) == "temperature at the threshold"
    drive.set_feature(Feature.TEMPERATURE_THRESHOLD, NEVER_OVER)
    assert drive.get_feature(Feature.TEMPERATURE_THRESHOLD) == NEVER_OVER
    drive.log_page(event.log_id)
    assert drive.wait_event(0.05) is None


def test_a_trace_over_the_wire(drive: Drive, tmp_path: Path) -> None:
    with drive.traced():
        drive.write(0, bytes(32 * BLOCK))
        drive.flush()
        drive.read(0, 32 * BLOCK)
    write_trace(tmp_path / "t.json", drive.log_page(LogPage.TRACE))
    page = json.loads((tmp_path / "t.json").read_text())
    names = {event["name"] for event in page["traceEvents"] if event["ph"] == "X"}
    assert {"Write", "Flush", "Read", "read", "program", "to the host"} <= names
    assert {event["ph"] for event in page["traceEvents"]} <= set("XMbeC")
    assert page["otherData"] == {"drive": "tiny", "time": "virtual", "spans_left_out": 0}


@pytest.mark.parametrize("page", ["smart", "error", "stage", "events", "telemetry", "endurance"])
def test_log_pages_are_printed(served: Served, page: str) -> None:
    from host_client.cli.app import app

    shown = CliRunner().invoke(app, ["log", page, "--drive", served.address])
    assert shown.exit_code == 0, shown.output
    as_json = CliRunner().invoke(app, ["log", page, "--drive", served.address, "--json"])
    answer = json.loads(as_json.stdout)
    assert TABLES[page](answer)[0].title.split()[0] in shown.stdout


def test_csd_trace_runs_a_command(served: Served, tmp_path: Path) -> None:
    from host_client.cli.app import app

    file = tmp_path / "t.json"
    code = "import os; from host_client.driver import Drive; "
    code += "Drive.connect(os.environ['CSD_DRIVE']).read(0, 4096)"
    command = ["trace", str(file), "--drive", served.address, "--", sys.executable, "-c", code]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    names = {event["name"] for event in json.loads(file.read_text())["traceEvents"]}
    assert "Read" in names
    refused = CliRunner().invoke(app, ["trace", str(file), "--drive", served.address])
    assert refused.exit_code == 2


def test_a_killed_daemon_is_noticed_by_the_next(tmp_path: Path) -> None:
    first = serve(tmp_path, "off")
    with Drive.connect(first.address) as drive:
        for block in range(40):
            drive.write(block * BLOCK, bytes(BLOCK))
        drive.flush()
        with pytest.raises(CommandFailed, match="time is off"), drive.traced():
            pass
        with pytest.raises(CommandFailed):
            drive.log_page(0x55)
        os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait(DEADLINE_S)
    second = serve(tmp_path, "off")
    with Drive.connect(second.address) as drive:
        smart = drive.log_page(LogPage.SMART)
        errors = drive.log_page(LogPage.ERROR)
        events = drive.log_page(LogPage.EVENTS)["events"]
    second.process.terminate()
    assert second.process.wait(DEADLINE_S) == 0
    assert (smart["power_cycles"], smart["unsafe_shutdowns"]) == (2, 1)
    assert smart["host_write_commands"] == 40  # saved by the Flush
    assert errors["error_count"] == smart["num_err_log_entries"] == 2
    assert [event["event"] for event in events] == ["unsafe_shutdown", "power_on", "power_on"]
