"""Critical warnings: what sets them, whom they are told to, and what masks them."""

import json

import pytest

from csd_device.clock import TimeMode
from csd_device.config import load_config
from csd_device.fault_config import Failures, FaultsConfig
from csd_device.firmware import commands as c
from csd_device.firmware import upkeep
from csd_device.firmware.flash_health import FlashHealth
from csd_protocol.opcodes import Feature, LogPage
from csd_protocol.status import Status

BLOCK = 4096
FOREVER = 1 << 62
HEALTHY = FlashHealth(
    available_spare=100, percentage_used=0, bad_superblocks=0, is_read_only=False, written_bytes=0
)
COLD, HOT = 273, 0xFFFF  # Kelvin: a threshold that is passed at once, and one that is not


def smart(host) -> dict:
    return json.loads(host.ok(c.GetLogPage(LogPage.SMART)).result.data)


def told(host, requests: list[int]) -> list[c.AsyncEventResult]:
    done = host.queue.pop_due(FOREVER)
    return [item.result for item in done if item.cid in requests]


@pytest.fixture
def wear(monkeypatch):
    """Sets what the FTL says of its health."""

    def become(**changes) -> None:
        health = FlashHealth(
            **{name: changes.get(name, getattr(HEALTHY, name)) for name in HEALTHY.__slots__}
        )
        monkeypatch.setattr(upkeep, "flash_health", lambda *_: health)

    become()
    return become


def test_a_temperature_threshold_is_told_once_until_the_log_is_read(host):
    requests = [host.submit(c.AsyncEvent()) for _ in range(3)]
    host.ok(c.SetFeatures(Feature.TEMPERATURE_THRESHOLD, COLD))
    assert [(e.type, e.info, e.log_id) for e in told(host, requests)] == []  # told with `ok`
    assert host.queue.in_flight == 2
    host.ok(c.SetFeatures(Feature.TEMPERATURE_THRESHOLD, HOT))
    host.ok(c.SetFeatures(Feature.TEMPERATURE_THRESHOLD, COLD))
    assert host.queue.in_flight == 2  # masked
    assert smart(host)["critical_warning"] == upkeep.TEMPERATURE
    host.ok(c.SetFeatures(Feature.TEMPERATURE_THRESHOLD, HOT))
    assert smart(host)["critical_warning"] == 0
    host.submit(c.SetFeatures(Feature.TEMPERATURE_THRESHOLD, COLD))
    assert [(e.type, e.info, e.log_id) for e in told(host, requests)] == [(1, 1, LogPage.SMART)]
    names = [
        (entry["event"], entry["detail"]["over_threshold"])
        for entry in json.loads(host.ok(c.GetLogPage(LogPage.EVENTS)).result.data)["events"]
        if entry["event"] == "thermal_excursion"
    ]
    assert [over for _, over in names] == [True, False, True, False, True]


@pytest.mark.parametrize(
    "changes, bit, info",
    [
        ({"available_spare": 9}, upkeep.SPARE_LOW, 2),
        ({"is_read_only": True}, upkeep.READ_ONLY, 0),
    ],
)
def test_wear_is_told_unless_it_is_configured_off(host, wear, changes, bit, info):
    requests = [host.submit(c.AsyncEvent()) for _ in range(2)]
    host.ok(c.SetFeatures(Feature.ASYNC_EVENT_CONFIGURATION, 0xFF & ~bit))
    wear(**changes)
    assert smart(host)["critical_warning"] == bit
    assert host.queue.in_flight == 2
    wear()
    assert smart(host)["critical_warning"] == 0
    host.ok(c.SetFeatures(Feature.ASYNC_EVENT_CONFIGURATION, bit))
    wear(**changes)
    upkeep.check_warnings(host.drive._controller)
    assert [(e.type, e.info, e.log_id) for e in told(host, requests)] == [(1, info, LogPage.SMART)]


def test_spare_at_its_threshold_is_no_warning(host, wear):
    wear(available_spare=10)
    assert smart(host)["critical_warning"] == 0


def test_bad_blocks_are_noted(host, wear):
    wear(bad_superblocks=2)
    smart(host)
    newest = json.loads(host.ok(c.GetLogPage(LogPage.EVENTS)).result.data)["events"][0]
    assert (newest["event"], newest["detail"]) == ("bad_blocks", {"bad_superblocks": 2})


def test_every_queue_pair_is_told(drive, make_host):
    first, second = make_host(drive, "first"), make_host(drive, "second")
    request = second.submit(c.AsyncEvent())
    first.ok(c.SetFeatures(Feature.TEMPERATURE_THRESHOLD, COLD))
    assert [event.info for event in told(second, [request])] == [1]


def test_an_event_waits_for_its_request(host):
    host.ok(c.SetFeatures(Feature.TEMPERATURE_THRESHOLD, COLD))
    request = host.submit(c.AsyncEvent())
    assert [event.info for event in told(host, [request])] == [1]


def test_warnings_are_looked_at_as_time_passes(open_drive, make_host):
    """A drive that gets warm says so without being asked for SMART."""
    drive = open_drive(TimeMode.VIRTUAL)
    host = make_host(drive)
    warm = smart(host)["composite_temperature"] + 1
    host.ok(c.SetFeatures(Feature.TEMPERATURE_THRESHOLD, warm))
    request = host.submit(c.AsyncEvent())
    drive.clock.advance_to(600 * 10**9)  # idling warms it from ambient
    host.submit(c.KeepAlive())
    assert [event.info for event in told(host, [request])] == [1]


def test_a_drive_that_wears_out_says_so_step_by_step(open_drive, make_host):
    """Program failures use up the spares; then the drive is read-only."""
    failing = FaultsConfig(program_failures=Failures(rate=0.02))
    drive = open_drive(config=load_config("tiny").model_copy(update={"faults": failing}))
    host = make_host(drive)
    refused, spares = False, [smart(host)["available_spare"]]
    while not refused:
        refused = host.run(c.Write(0, bytes(64 * BLOCK), fua=True)).status is Status.WRITE_PROTECTED
        spares.append(smart(host)["available_spare"])
    assert (spares[0], spares[-1]) == (100, 0)
    assert spares == sorted(spares, reverse=True)
    health = smart(host)
    assert health["critical_warning"] & (upkeep.SPARE_LOW | upkeep.READ_ONLY) == 9
    history = json.loads(host.ok(c.GetLogPage(LogPage.EVENTS)).result.data)["events"]
    names = [entry["event"] for entry in reversed(history)]
    assert names.index("bad_blocks") < names.index("spare_below_threshold")
    assert names.index("spare_below_threshold") <= names.index("read_only")
    drive.close()
    again = make_host(open_drive())
    assert smart(again)["critical_warning"] & upkeep.READ_ONLY
