"""Reads by the batch: the times, bytes and counts of a queue pair, and its refusals."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from csd_device.clock import TimeMode, VirtualClock
from csd_device.config import load_config
from csd_device.drive import Drive
from csd_device.errors import CommandError
from csd_device.firmware import commands as c
from csd_protocol.status import Status

BLOCKS = 2048  # written


class Twin:
    """A drive, filled with random bytes; any two are alike."""

    def __init__(self, folder: Path, mode: TimeMode) -> None:
        self.drive = Drive.open(
            load_config("tiny"),
            folder / "drive.csd",
            clock=VirtualClock(),
            time_mode=mode,
            window_path=folder / "window",
        )
        self.queue = self.drive.connect("host", "host")
        self.data = np.random.default_rng(3).integers(0, 256, (BLOCKS, 4096), np.uint8)
        for slba in range(0, BLOCKS, 256):
            self.ask(c.Write(slba, self.data[slba : slba + 256].tobytes()))

    def ask(self, command: c.Command) -> c.Completion:
        self.queue.submit(1, command, self.drive.clock.now_ns())
        (done,) = self.queue.pop_due(self.drive.clock.now_ns())
        return done


@pytest.fixture
def twins(tmp_path: Path) -> Iterator[tuple[Twin, Twin]]:
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    one, other = (Twin(folder, TimeMode.VIRTUAL) for folder in folders)
    yield one, other
    one.drive.close()
    other.drive.close()


@pytest.mark.parametrize("blocks", [1, 3, 16, 256])
def test_a_batch_takes_the_times_of_a_queue_pair(twins: tuple[Twin, Twin], blocks: int) -> None:
    one, other = twins
    slbas = np.random.default_rng(4).integers(0, BLOCKS - blocks, 60)
    start = one.drive.clock.now_ns()
    arrivals = start + np.arange(60) * 5_000
    done = one.drive.read_batch(slbas, blocks, arrivals)
    expected = []
    for cid, (slba, at) in enumerate(zip(slbas.tolist(), arrivals.tolist(), strict=True)):
        other.queue.submit(cid, c.Read(c.BlockRange(slba, blocks)), at)
        (completion,) = other.queue.pop_due(at)
        expected.append(completion.timing.done_ns)
    assert done.tolist() == expected
    assert one.drive.clock.now_ns() == max(expected)


def test_a_closed_loop_submits_when_one_completes(twins: tuple[Twin, Twin]) -> None:
    drive = twins[0].drive
    slbas = np.random.default_rng(5).integers(0, BLOCKS, 300)
    slots = np.full(8, drive.clock.now_ns())
    submitted, done = drive.read_closed_loop(slbas, 1, slots)
    assert (np.diff(submitted) >= 0).all()
    for at in submitted:
        assert np.count_nonzero((submitted <= at) & (done > at)) <= 8
    assert sorted(slots) == sorted(done)[-8:]


def test_a_loop_in_pieces_is_one_loop(twins: tuple[Twin, Twin]) -> None:
    slbas = np.random.default_rng(6).integers(0, BLOCKS, 200)
    start = twins[0].drive.clock.now_ns()
    whole = twins[0].drive.read_closed_loop(slbas, 1, np.full(16, start))[1]
    slots = np.full(16, start)
    pieces = [twins[1].drive.read_closed_loop(slbas[at : at + 50], 1, slots)[1] for at in (0, 50)]
    assert np.concatenate(pieces).tolist() == whole[:100].tolist()


def test_data_moves_and_is_counted(twins: tuple[Twin, Twin]) -> None:
    one, _ = twins
    out = np.empty((3, 2 * 4096), np.uint8)
    before = one.ask(c.GetLogPage(0x02)).result
    slbas = np.array([7, 100, 2046])
    one.drive.read_batch(slbas, 2, np.full(3, one.drive.clock.now_ns()), out)
    for row, slba in zip(out, slbas, strict=True):
        assert (row == one.data[slba : slba + 2].reshape(-1)).all()
    assert before != one.ask(c.GetLogPage(0x02)).result


def test_unmapped_blocks_read_as_zeroes_and_touch_no_page(twins: tuple[Twin, Twin]) -> None:
    drive = twins[0].drive
    now = drive.clock.now_ns()
    done = drive.read_batch(np.array([50_000]), 1, np.array([now]))
    link = drive.config.link
    assert done.tolist() == [now + link.firmware_ns + link.transfer_ns(4096)]


def test_with_time_off_nothing_takes_time(tmp_path: Path) -> None:
    twin = Twin(tmp_path, TimeMode.OFF)
    assert twin.drive.read_batch(np.array([1]), 1, np.array([5])).tolist() == [5]
    twin.drive.close()


@pytest.mark.parametrize(
    "slba, blocks, status",
    [
        (1 << 40, 1, Status.LBA_OUT_OF_RANGE),
        (-1, 1, Status.LBA_OUT_OF_RANGE),
        (0, 257, Status.INVALID_FIELD),
        (0, 0, Status.INVALID_FIELD),
    ],
)
def test_refusals(twins: tuple[Twin, Twin], slba: int, blocks: int, status: Status) -> None:
    drive = twins[0].drive
    with pytest.raises(CommandError) as refused:
        drive.read_batch(np.array([0, slba]), blocks, np.zeros(2, np.int64))
    assert refused.value.status is status
