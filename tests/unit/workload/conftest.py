"""Drives without bytes, filled with time off, for workloads."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from csd_device.clock import TimeMode, VirtualClock
from csd_device.config import load_config
from csd_device.drive import Drive
from csd_device.nand.media import HollowMedia
from csd_device.workload.runner import Outcome, fill, run_jobs

dice = np.random.default_rng
Opened = Callable[[str, float], tuple[Drive, int]]


def quiet(requests: int, passed_ns: int) -> None:
    assert requests >= 0
    assert passed_ns >= 0


@contextmanager
def opened(folder: Path, name: str, mode: TimeMode) -> Iterator[Drive]:
    drive = Drive.open(
        load_config(name),
        folder / "drive.csd",
        clock=VirtualClock(),
        time_mode=mode,
        window_path=folder / "window",
        wrap=lambda media, _: HollowMedia(media),
    )
    yield drive
    drive.close()


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Opened]:
    """Opens a drive by name, filled to a share; how many bytes hold data."""
    with ExitStack() as stack:

        def make(name: str, share: float) -> tuple[Drive, int]:
            folder = tmp_path / f"{name}-{share}"
            folder.mkdir()
            with opened(folder, name, TimeMode.OFF) as drive:
                length = fill(drive, share, quiet)
            return stack.enter_context(opened(folder, name, TimeMode.VIRTUAL)), length

        yield make


def run_alone(drive: Drive, job) -> Outcome:
    (outcome,) = run_jobs(drive, [job], dice, quiet)
    return outcome


def iops(outcome: Outcome) -> float:
    return outcome.requests * 1e9 / (outcome.ended_ns - outcome.started_ns)
