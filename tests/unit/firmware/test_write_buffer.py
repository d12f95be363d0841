"""The write buffer: room, what leaves it, and what a flush waits for."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from csd_device.clock import TimeMode, VirtualClock
from csd_device.config import DriveConfig, load_config
from csd_device.drive import Drive
from csd_device.firmware import commands as c
from csd_device.firmware.write_buffer import WriteBuffer

MIB = 1 << 20
Ask = Callable[[c.Command], c.Timing]


def test_room_is_taken_at_once_while_there_is_some() -> None:
    buffer = WriteBuffer(100, 10)
    assert [buffer.admit(5, 50), buffer.admit(6, 50)] == [5, 6]


def test_a_full_buffer_admits_when_enough_pages_are_programmed() -> None:
    buffer = WriteBuffer(40, 10)
    buffer.admit(0, 40)
    buffer.drain(np.array([100, 200, 300, 400]))
    assert buffer.admit(1, 10) == 100
    assert buffer.admit(1, 20) == 300
    assert buffer.drained_ns() == 400


def test_what_has_left_makes_room_by_then() -> None:
    buffer = WriteBuffer(40, 10)
    buffer.admit(0, 40)
    buffer.drain(np.array([100, 200]))
    assert buffer.admit(500, 20) == 500


def test_programs_without_host_data_free_nothing() -> None:
    buffer = WriteBuffer(20, 10)
    buffer.drain(np.array([50]))
    buffer.admit(0, 15)
    buffer.drain(np.array([100, 200]))  # 10 bytes, 5 bytes
    assert buffer.admit(0, 10) == 100
    assert buffer.admit(0, 10) == 200


def drive_with(capacity_bytes: int, protected: bool = True) -> DriveConfig:
    figures = load_config("tiny").model_dump()
    figures["write_buffer"] = {
        "capacity_bytes": capacity_bytes,
        "power_loss_protected": protected,
    }
    return DriveConfig.model_validate(figures)


@pytest.fixture
def asking(tmp_path: Path) -> Iterator[Callable[[DriveConfig], Ask]]:
    drives = []

    def start(config: DriveConfig) -> Ask:
        drive = Drive.open(
            config,
            tmp_path / "drive.csd",
            clock=VirtualClock(),
            time_mode=TimeMode.VIRTUAL,
            window_path=tmp_path / "window",
        )
        drives.append(drive)
        queue = drive.connect("host", "host")

        def ask(command: c.Command) -> c.Timing:
            queue.submit(1, command, drive.clock.now_ns())
            (done,) = queue.pop_due(drive.clock.now_ns())
            assert not done.detail
            return done.timing

        return ask

    yield start
    for drive in drives:
        drive.close()


def test_a_write_completes_when_it_is_buffered(asking: Callable[[DriveConfig], Ask]) -> None:
    config = drive_with(8 * MIB)
    timing = asking(config)(c.Write(0, bytes(MIB)))
    assert timing.nand_ns == 0
    assert timing.link_ns == config.link.transfer_ns(MIB)


def test_without_a_buffer_it_waits_for_its_programs(asking: Callable[[DriveConfig], Ask]) -> None:
    config = drive_with(0)
    assert asking(config)(c.Write(0, bytes(MIB))).nand_ns > config.timing.program_ns


def test_writes_beyond_the_buffer_go_at_the_rate_of_programs(
    asking: Callable[[DriveConfig], Ask],
) -> None:
    config = drive_with(4 * MIB)
    ask = asking(config)
    done = [ask(c.Write(turn * 256, bytes(MIB))).done_ns for turn in range(120)]
    geometry, cells = config.geometry, config.timing
    planes_ns = geometry.planes_per_die * (cells.command_ns + 16384)
    # A round of all dies: their data goes over the channel one after the other, then tPROG.
    round_ns = max(planes_ns + cells.program_ns, geometry.dies_per_channel * planes_ns)
    rounds = MIB / (geometry.planes * geometry.page_bytes)
    steady_ns = (done[-1] - done[20]) / 99
    assert steady_ns == pytest.approx(rounds * round_ns, rel=0.02)


@pytest.mark.parametrize("protected", [True, False])
@pytest.mark.parametrize("command", [c.Flush(), c.Write(0, bytes(16384), fua=True)])
def test_what_must_last_waits_for_programs_unless_power_loss_is_provided_for(
    asking: Callable[[DriveConfig], Ask], command: c.Command, protected: bool
) -> None:
    ask = asking(drive_with(8 * MIB, protected))
    ask(c.Write(0, bytes(MIB)))
    assert (ask(command).nand_ns == 0) == protected


def test_a_buffer_smaller_than_a_command_is_refused() -> None:
    with pytest.raises(ValueError, match=r"write buffer of 512.0 KiB is smaller than one command"):
        drive_with(MIB // 2)
