"""Admin and NVM commands, one by one, and the programs that survive a restart."""

import json

import numpy as np
import pytest

from csd_device.clock import TimeMode
from csd_device.config import load_config
from csd_device.firmware import commands as c
from csd_device.firmware.dispatch import HANDLERS
from csd_protocol.opcodes import Feature, LogPage
from csd_protocol.program_file import encode_frequency
from csd_protocol.status import Status

BLOCK = 4096


def data_of(seed: int, blocks: int = 1) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, blocks * BLOCK, np.uint8).tobytes()


def read(host, slba: int, blocks: int = 1) -> bytes:
    return host.ok(c.Read(c.BlockRange(slba, blocks))).result.data


def identify(host, cns: int) -> dict:
    return json.loads(host.ok(c.Identify(cns)).result.data)


def log_page(host, page: LogPage) -> dict:
    return json.loads(host.ok(c.GetLogPage(page)).result.data)


def test_every_command_has_a_handler():
    own = {c.Abort, c.AsyncEvent}
    assert set(HANDLERS) | own == set(c.Command.__args__)


def test_written_blocks_are_read_and_others_are_zero(host):
    host.ok(c.Write(5, data_of(1, 3)))
    assert read(host, 5, 3) == data_of(1, 3)
    assert read(host, 4) == bytes(BLOCK)
    host.ok(c.Flush())
    host.ok(c.WriteZeroes(c.BlockRange(6, 1)))
    assert read(host, 5, 3) == data_of(1, 3)[:BLOCK] + bytes(BLOCK) + data_of(1, 3)[2 * BLOCK :]
    host.ok(c.DatasetManagement((c.BlockRange(5, 1), c.BlockRange(7, 1))))
    assert read(host, 5, 3) == bytes(3 * BLOCK)


def test_compare_verify_and_copy(host):
    host.ok(c.Write(0, data_of(2, 4)))
    host.ok(c.Compare(0, data_of(2, 4)))
    different = bytearray(data_of(2, 4))
    different[2 * BLOCK + 9] ^= 4
    failed = host.run(c.Compare(0, bytes(different)))
    assert failed.status is Status.COMPARE_FAILURE
    assert "block 2" in failed.detail
    host.ok(c.Verify(c.BlockRange(0, 600)))
    host.ok(c.Copy(10, (c.BlockRange(2, 2), c.BlockRange(0, 1))))
    assert read(host, 10, 3) == data_of(2, 4)[2 * BLOCK :] + data_of(2, 4)[:BLOCK]


def test_a_copy_longer_than_a_piece(host):
    data = data_of(3, 256)
    for slba in (0, 256):
        host.ok(c.Write(slba, data))
    host.ok(c.Copy(1000, (c.BlockRange(0, 400),)))
    assert read(host, 1000, 256) == data
    assert read(host, 1256, 144) == data[: 144 * BLOCK]


@pytest.mark.parametrize(
    "command, status",
    [
        (c.Write(0, b""), Status.INVALID_FIELD),
        (c.Write(0, bytes(100)), Status.INVALID_FIELD),
        (c.Write(0, bytes((1 << 20) + BLOCK)), Status.INVALID_FIELD),
        (c.Write(1 << 40, bytes(BLOCK)), Status.LBA_OUT_OF_RANGE),
        (c.Read(c.BlockRange(0, 0)), Status.INVALID_FIELD),
        (c.Read(c.BlockRange(0, 257)), Status.INVALID_FIELD),
        (c.Read(c.BlockRange(1 << 63, 1)), Status.LBA_OUT_OF_RANGE),
        (c.Compare(1 << 40, bytes(BLOCK)), Status.LBA_OUT_OF_RANGE),
        (c.Verify(c.BlockRange(1 << 40, 1)), Status.LBA_OUT_OF_RANGE),
        (c.WriteZeroes(c.BlockRange(0, 1 << 31)), Status.LBA_OUT_OF_RANGE),
        (c.DatasetManagement(()), Status.INVALID_FIELD),
        (c.DatasetManagement((c.BlockRange(0, 1),) * 257), Status.INVALID_FIELD),
        (c.Copy(0, ()), Status.INVALID_FIELD),
        (c.Copy(0, (c.BlockRange(0, 1),)), Status.INVALID_FIELD),
        (c.Copy(0, (c.BlockRange(1 << 40, 1),)), Status.LBA_OUT_OF_RANGE),
        (c.Copy(1 << 40, (c.BlockRange(0, 1),)), Status.LBA_OUT_OF_RANGE),
        (c.Copy(0, (c.BlockRange(100, 20_000),)), Status.INVALID_FIELD),
        (c.Identify(0x55), Status.INVALID_FIELD),
        (c.GetLogPage(0x55), Status.INVALID_LOG_PAGE),
        (c.GetFeatures(0x55), Status.INVALID_FIELD),
        (c.SetFeatures(Feature.NUMBER_OF_QUEUES, 1), Status.INVALID_FIELD),
        (c.SetFeatures(Feature.VOLATILE_WRITE_CACHE, 2), Status.INVALID_FIELD),
        (c.Format(1), Status.INVALID_FIELD),
        (c.MemoryRangeSet(0, 0), Status.INVALID_FIELD),
        (c.MemoryRangeSet(1 << 40, 0), Status.DRAM_EXCEEDED),
        (c.ProgramActivation(3, True), Status.NO_PROGRAM),
        (c.LoadProgram(3, 0, 0, b"", unload=True), Status.NO_PROGRAM),
        (c.LoadProgram(256, 8, 0, b"x"), Status.INVALID_PROGRAM_INDEX),
        (c.LoadProgram(3, 1 << 40, 0, b"x"), Status.PROGRAM_TOO_BIG),
        (c.LoadProgram(3, 30 << 20, 0, b"x"), Status.INSUFFICIENT_PROGRAM_RESOURCES),
        (c.LoadProgram(3, 4, 0, b""), Status.SEQUENCE_ERROR),
        (c.LoadProgram(3, 4, 0, b"12345"), Status.SEQUENCE_ERROR),
        (c.LoadProgram(3, 8, 4, b"1234"), Status.SEQUENCE_ERROR),
        (c.LoadProgram(3, 8, 0, b"12345678"), Status.INVALID_PROGRAM_DATA),
    ],
)  # fmt: skip
def test_bad_commands_have_their_status_and_are_logged(host, command, status):
    dram = identify(host, 0xC0)["dram"]
    completion = host.run(command)
    assert completion.status is status
    assert completion.detail
    assert completion.do_not_retry is not status.value.retryable
    newest = log_page(host, LogPage.ERROR)["entries"][0]
    assert (newest["sct"], newest["sc"]) == (status.sct, status.sc)
    assert newest["command"] == type(command).__name__
    assert identify(host, 0xC0)["dram"] == dram


def test_features_are_kept(host):
    host.ok(c.SetFeatures(Feature.VOLATILE_WRITE_CACHE, 0))
    assert host.ok(c.GetFeatures(Feature.VOLATILE_WRITE_CACHE)).result == c.Dword0(0)
    host.ok(c.Write(0, bytes(BLOCK)))
    queues = host.ok(c.GetFeatures(Feature.NUMBER_OF_QUEUES)).result.value
    assert queues == 15 | 15 << 16


def test_identify_describes_the_drive(host):
    host.ok(c.Write(0, bytes(2 * BLOCK)))
    namespace = identify(host, 0)
    assert namespace["used_blocks"] == 2
    assert namespace["blocks"] * namespace["block_bytes"] == host.drive.capacity_bytes
    controller = identify(host, 1)
    assert controller["model"] == "tiny"
    assert controller["mdts_bytes"] == host.drive.mdts_bytes
    config = load_config("tiny")
    assert controller["nand"] == {
        "bytes_per_s": config.nand_bytes_per_s,
        "read_ns": config.timing.mean_read_ns,
    }
    assert controller["dram"]["unit_cache_bytes"] == config.dram.unit_cache_bytes
    assert controller["link"]["payload_bytes_per_s"] == config.link.payload_bytes_per_s
    window = identify(host, 0xC0)
    assert window["bytes"] == host.drive.window_bytes
    assert window["path"] == str(host.drive.window_path)
    dram = window["dram"]
    assert sum(dram.values()) == 2 * dram["total"]


def test_smart_counts_what_happened(host):
    host.ok(c.Write(0, bytes(BLOCK)))
    read(host, 0)
    host.run(c.Read(c.BlockRange(0, 0)))
    smart = log_page(host, LogPage.SMART)
    assert (smart["written_bytes"], smart["read_bytes"]) == (BLOCK, BLOCK)
    assert (smart["data_units_written"], smart["data_units_read"]) == (1, 1)
    assert (smart["host_write_commands"], smart["host_read_commands"]) == (1, 2)
    assert smart["failed_commands"] == smart["num_err_log_entries"] == 1
    assert smart["flash"]["sectors_written"] == 1


def test_memory_ranges_move_unless_leased(staged_host):
    path = staged_host.drive.window_path
    staged_host.ok(c.MemoryRangeSet(1 << 20, 0))
    assert path.stat().st_size == staged_host.drive.window_bytes == 1 << 20
    staged_host.ok(c.Stage(1, (c.Target(0, c.What.ALL),)))
    in_use = staged_host.run(c.MemoryRangeSet(2 << 20, 0))
    assert in_use.status is Status.MEMORY_RANGE_SET_IN_USE
    staged_host.ok(c.Release(()))
    staged_host.ok(c.MemoryRangeSet(2 << 20, 1 << 20))
    assert identify(staged_host, 0xC0)["dram"]["unit_cache"] == 1 << 20


def test_programs_and_their_activation_survive_a_restart(open_drive, make_host, shadow):
    drive = open_drive()
    host = make_host(drive)
    host.load(7, shadow, chunk=1000)
    host.load(9, encode_frequency("m", {0: np.arange(5)}))
    host.ok(c.ProgramActivation(9, False))
    before = identify(host, 0xC1)["programs"]
    assert [(p["program"], p["kind"], p["active"]) for p in before] == [
        (7, "shadow", True),
        (9, "frequency", False),
    ]
    drive.close()
    again = make_host(open_drive())
    assert identify(again, 0xC1)["programs"] == before
    assert identify(again, 0xC0)["dram"]["program.7"] == len(shadow)
    again.ok(c.LoadProgram(7, 0, 0, b"", unload=True))
    assert [p["program"] for p in identify(again, 0xC1)["programs"]] == [9]
    assert "program.7" not in identify(again, 0xC0)["dram"]


def test_a_load_replaces_the_program_and_a_broken_one_gives_its_dram_back(host, shadow):
    host.load(7, shadow)
    other = encode_frequency("other", {0: np.arange(5)})
    host.load(7, other)
    assert [p["model"] for p in identify(host, 0xC1)["programs"]] == ["other"]
    assert identify(host, 0xC0)["dram"]["program.7"] == len(other)
    host.ok(c.LoadProgram(7, len(shadow), 0, shadow[:100]))
    assert host.run(c.LoadProgram(7, len(shadow), 200, b"x")).status is Status.SEQUENCE_ERROR
    assert "program.7" not in identify(host, 0xC0)["dram"]


def test_a_damaged_program_file_is_left_out_and_logged(open_drive, make_host, shadow, tmp_path):
    drive = open_drive()
    make_host(drive).load(7, shadow)
    drive.close()
    (tmp_path / "drive.csd" / "programs" / "7.safetensors").write_bytes(shadow[:1000])
    host = make_host(open_drive())
    assert identify(host, 0xC1)["programs"] == []
    assert log_page(host, LogPage.ERROR)["entries"][0]["status"] == "Invalid Program Data"
    host.load(7, shadow)


def test_an_interrupted_load_leaves_the_media_as_it_was(open_drive, make_host, shadow):
    drive = open_drive()
    host = make_host(drive)
    host.ok(c.LoadProgram(7, len(shadow), 0, shadow[:100]))
    drive.close()
    assert identify(make_host(open_drive()), 0xC1)["programs"] == []


def test_uploads_at_once_are_bounded(host):
    for number in range(4):
        host.ok(c.LoadProgram(number, 100, 0, b"x"))
    fifth = host.run(c.LoadProgram(5, 100, 0, b"x"))
    assert fifth.status is Status.INSUFFICIENT_PROGRAM_RESOURCES


def test_writes_survive_a_restart(open_drive, make_host):
    drive = open_drive(TimeMode.VIRTUAL)
    host = make_host(drive)
    host.ok(c.Write(3, data_of(4), fua=True))
    drive.close()
    assert read(make_host(open_drive()), 3) == data_of(4)


def test_a_window_that_shared_memory_cannot_hold_leaves_the_old_one(host, monkeypatch):
    from csd_device.errors import DriveRefused
    from csd_device.firmware import memory_ranges

    real, before = memory_ranges.Window, host.drive.window_bytes

    def refusing(path, size_bytes):
        if size_bytes != before:
            raise DriveRefused("no room")
        return real(path, size_bytes)

    monkeypatch.setattr(memory_ranges, "Window", refusing)
    assert host.run(c.MemoryRangeSet(1 << 20, 0)).status is Status.DRAM_EXCEEDED
    assert host.drive.window_path.stat().st_size == before
    assert identify(host, 0xC0)["dram"]["window"] == before
