"""SMART and its kin: units, what moves them, and that they last."""

import json
import shutil
from itertools import pairwise
from math import exp

import numpy as np
import pytest

from csd_device.clock import TimeMode, VirtualClock
from csd_device.config import Thermal, load_config
from csd_device.drive import Drive
from csd_device.firmware import commands as c
from csd_device.firmware.counters import BusyTime
from csd_device.firmware.latency import BUCKET_BOUNDS_NS, Histogram
from csd_device.firmware.upkeep import SAVE_COMMANDS
from csd_protocol.opcodes import LogPage
from csd_protocol.status import Status

BLOCK = 4096
SECOND = 10**9
# What only ever grows over a drive's life.
LASTING = (
    "data_units_read",
    "data_units_written",
    "host_read_commands",
    "host_write_commands",
    "busy_ns",
    "controller_busy_time",
    "power_on_hours",
    "power_on_ns",
    "media_errors",
    "num_err_log_entries",
    "nand_written_bytes",
    "admin_commands",
    "staged_bytes",
)


def log_page(host, page: LogPage) -> dict:
    return json.loads(host.ok(c.GetLogPage(page)).result.data)


def event_names(host) -> list[str]:
    return [entry["event"] for entry in log_page(host, LogPage.EVENTS)["events"]]


def after_kill(drive: Drive, tmp_path, name: str = "killed", spoil=lambda logs: None) -> Drive:
    """A drive opened on what a killed daemon would have left."""
    media = tmp_path / f"{name}.csd"
    shutil.copytree(tmp_path / "drive.csd", media, ignore=shutil.ignore_patterns("nand.img"))
    with (media / "nand.img").open("wb") as cells:  # only zeroes were written
        cells.truncate(drive.config.geometry.raw_bytes)
    spoil(media / "logs")
    return Drive.open(
        drive.config,
        media,
        clock=VirtualClock(),
        time_mode=drive.time_mode,
        window_path=tmp_path / f"{name}.window",
    )


def test_data_units_are_thousands_of_512_bytes_rounded_up(host):
    for _ in range(125):
        host.ok(c.Write(0, bytes(BLOCK)))
    assert log_page(host, LogPage.SMART)["data_units_written"] == 1  # 512,000 bytes
    host.ok(c.Write(0, bytes(BLOCK)))
    host.ok(c.Compare(0, bytes(BLOCK)))
    host.ok(c.Verify(c.BlockRange(0, 125)))
    host.ok(c.Copy(1000, (c.BlockRange(0, 1),)))
    smart = log_page(host, LogPage.SMART)
    assert (smart["data_units_written"], smart["data_units_read"]) == (2, 2)
    assert (smart["host_write_commands"], smart["host_read_commands"]) == (126, 1)
    endurance = log_page(host, LogPage.ENDURANCE)
    assert (endurance["data_units_written"], endurance["data_units_read"]) == (1, 1)  # 10**9


def test_staged_bytes_are_data_read(staged_host, packed):
    before = log_page(staged_host, LogPage.SMART)
    site = staged_host.ok(c.Stage(1, (c.Target(0, c.What.ALL),))).result.sites[0]
    after = log_page(staged_host, LogPage.SMART)
    assert after["staged_bytes"] - before["staged_bytes"] == site.length_bytes
    assert after["host_read_commands"] == before["host_read_commands"]
    units = -(-(after["read_bytes"] + after["staged_bytes"]) // 512_000)
    assert after["data_units_read"] == units


def test_busy_time_is_a_union(open_drive, make_host):
    host = make_host(open_drive(TimeMode.VIRTUAL))
    host.ok(c.Write(0, bytes(64 * BLOCK)))
    idle = log_page(host, LogPage.SMART)["busy_ns"]
    at_ns = host.drive.clock.now_ns() + SECOND
    for cid in range(4):
        host.queue.submit(100 + cid, c.Read(c.BlockRange(0, 64)), at_ns)
    done = [item.timing for item in host.queue.pop_due(1 << 62)]
    grown = log_page(host, LogPage.SMART)["busy_ns"] - idle
    union = max(timing.done_ns for timing in done) - at_ns
    assert union <= grown < union + 10_000  # and the admin command that asked
    assert sum(timing.done_ns - timing.submitted_ns for timing in done) > grown


def test_busy_time_of_arrays_is_that_of_one_after_the_other():
    rng = np.random.default_rng(3)
    starts = np.sort(rng.integers(0, 10_000, 200))
    ends = starts + rng.integers(0, 300, 200)
    one, many = BusyTime(), BusyTime()
    one.add(0, 50), many.add(0, 50)
    assert sum(map(one.add, starts.tolist(), ends.tolist())) == many.add_all(starts, ends)
    assert one.until_ns == many.until_ns


def test_histograms_of_arrays_are_those_of_one_after_the_other():
    took = np.array([0, 1, 1024, 1025, 2048, BUCKET_BOUNDS_NS[-1], BUCKET_BOUNDS_NS[-1] + 1])
    one, many = Histogram(), Histogram()
    for value in took.tolist():
        one.add(value)
    many.add_all(took)
    assert one.counts == many.counts
    assert one.sum_ns == many.sum_ns == took.sum()
    assert (one.counts[0], one.counts[1], one.counts[-2], one.counts[-1]) == (3, 2, 1, 1)


def test_temperature_rises_with_work(open_drive, make_host):
    quick = Thermal(time_constant_s=0.1, warning_celsius=36, critical_celsius=37)
    config = load_config("tiny").model_copy(update={"thermal": quick})
    drive = open_drive(TimeMode.VIRTUAL, config)
    host = make_host(drive)
    assert log_page(host, LogPage.SMART)["composite_temperature"] == 35 + 273
    for lba in range(100):
        host.ok(c.Write(lba, bytes(64 * BLOCK)))
    smart = log_page(host, LogPage.SMART)
    warmed = 1 - exp(-smart["power_on_ns"] / SECOND / quick.time_constant_s)
    idle = quick.ambient_celsius + quick.celsius_per_watt * quick.idle_watts * warmed
    assert log_page(host, LogPage.TELEMETRY)["celsius"] > idle + 0.5
    assert min(smart["critical_temp_ns"], smart["warning_temp_ns"]) > 0


# ---- what lasts ------------------------------------------------------------------------------


def test_counters_last_and_never_fall(open_drive, make_host):
    seen = []
    for cycle in range(3):
        drive = open_drive(TimeMode.VIRTUAL)
        host = make_host(drive)
        seen.append(log_page(host, LogPage.SMART))
        host.ok(c.Write(cycle, bytes(BLOCK), fua=True))
        host.ok(c.Read(c.BlockRange(0, 1)))
        host.run(c.Read(c.BlockRange(0, 0)))
        seen.append(log_page(host, LogPage.SMART))
        drive.close()
    for before, after in pairwise(seen):
        assert all(after[name] >= before[name] for name in LASTING)
    assert [smart["power_cycles"] for smart in seen] == [1, 1, 2, 2, 3, 3]
    assert seen[-1]["host_write_commands"] == seen[-1]["num_err_log_entries"] == 3
    assert seen[-1]["unsafe_shutdowns"] == 0
    assert seen[-1]["nand_written_bytes"] > 0


def test_errors_and_events_last(open_drive, make_host, shadow):
    drive = open_drive()
    host = make_host(drive)
    host.run(c.Read(c.BlockRange(0, 0)))
    host.ok(c.Format(0))
    host.load(7, shadow)
    host.ok(c.SetFeatures(6, 0))
    errors = log_page(host, LogPage.ERROR)
    drive.close()
    host = make_host(open_drive())
    assert log_page(host, LogPage.ERROR) == errors
    assert event_names(host) == [
        "power_on", "power_off", "set_feature", "program_activation", "program_load",
        "format_completion", "format_start", "power_on",
    ]  # fmt: skip
    events = log_page(host, LogPage.EVENTS)
    assert [entry["event_number"] for entry in events["events"]] == list(range(8, 0, -1))
    assert [entry["event_type"] for entry in events["events"][-3:]] == [0x08, 0x07, 0x04]
    assert host.run(c.Read(c.BlockRange(0, 0))).status is Status.INVALID_FIELD
    assert log_page(host, LogPage.ERROR)["error_count"] == errors["error_count"] + 1


def test_a_killed_drive_loses_little_and_says_so(open_drive, make_host, tmp_path):
    drive = open_drive(TimeMode.VIRTUAL)
    host = make_host(drive)
    for _ in range(SAVE_COMMANDS + 20):
        host.ok(c.Write(0, bytes(BLOCK)))
    host.run(c.Read(c.BlockRange(0, 0)))
    with_losses = make_host(after_kill(drive, tmp_path))
    smart = log_page(with_losses, LogPage.SMART)
    assert SAVE_COMMANDS - 1 <= smart["host_write_commands"] <= SAVE_COMMANDS + 20
    assert (smart["power_cycles"], smart["unsafe_shutdowns"]) == (2, 1)
    assert smart["num_err_log_entries"] == 1  # written as it happened
    assert event_names(with_losses)[:2] == ["unsafe_shutdown", "power_on"]
    with_losses.drive.close()
    host.ok(c.Flush())
    flushed = make_host(after_kill(drive, tmp_path, "flushed"))
    assert log_page(flushed, LogPage.SMART)["host_write_commands"] >= SAVE_COMMANDS - 1
    flushed.drive.close()


@pytest.mark.parametrize("name", ["life.csd", "records.csd"])
@pytest.mark.parametrize("damage", ["torn", "flipped", "garbage", "folder"])
def test_damaged_logs_never_stop_a_drive(open_drive, make_host, tmp_path, name, damage):
    drive = open_drive()
    host = make_host(drive)
    host.run(c.Read(c.BlockRange(0, 0)))
    host.ok(c.SetFeatures(6, 0))

    def spoil(logs):
        data = (logs / name).read_bytes()
        flipped = data[:-10] + bytes([data[-10] ^ 1]) + data[-9:]
        contents = {"torn": data[:-9], "flipped": flipped, "garbage": b"\xff\0{}" * 9}
        if damage == "folder":
            (logs / name).unlink()
            (logs / name).mkdir()
        else:
            (logs / name).write_bytes(contents[damage])

    host = make_host(after_kill(drive, tmp_path, spoil=spoil))
    assert "log_damaged" in event_names(host)
    host.ok(c.Write(0, bytes(BLOCK)))
    smart = log_page(host, LogPage.SMART)
    assert smart["host_write_commands"] == 1
    assert smart["power_cycles"] == (1 if name == "life.csd" else 2)
    host.drive.close()


def test_records_stay_bounded(open_drive, make_host, tmp_path, monkeypatch):
    from csd_device.firmware import log_folder

    monkeypatch.setattr(log_folder, "RECORDS_MAX", 40)
    drive = open_drive()
    host = make_host(drive)
    for value in range(100):
        host.ok(c.SetFeatures(6, value % 2))
    records = tmp_path / "drive.csd" / "logs" / "records.csd"
    assert len(records.read_bytes().splitlines()) <= 101
    before = event_names(host)
    drive.close()
    assert event_names(make_host(open_drive()))[2:] == before


def test_logs_that_cannot_be_written_fail_no_command(open_drive, make_host, tmp_path):
    drive = open_drive()
    logs = tmp_path / "drive.csd" / "logs"
    shutil.rmtree(logs)
    logs.write_bytes(b"in the way")
    host = make_host(drive)
    for _ in range(SAVE_COMMANDS):
        host.ok(c.Write(0, bytes(BLOCK)))
    assert log_page(host, LogPage.TELEMETRY)["logs"]["write_error"]
