"""What every command shares: where people are spoken to, progress, and opening a drive."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from csd_protocol.address import parse_address
from host_client.driver import Drive

DRIVE_VARIABLE = "CSD_DRIVE"
EXIT_REQUEST = 5  # a request that cannot be met
EXIT_DAMAGED = 6  # a model on the drive has damaged units
CSD = ("-c", "from host_client.cli.app import main; main()")  # to the interpreter: `csd`

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class TimeMode(StrEnum):
    WALL = "wall"
    VIRTUAL = "virtual"
    OFF = "off"


def open_drive(address: str | None, time_mode: TimeMode) -> Drive:
    """The drive at `address` (or at $CSD_DRIVE), else an embedded one with its own daemon.

    Raises DriveUnavailable, and BadParameter for what is no address.
    """
    address = address or os.environ.get(DRIVE_VARIABLE)
    if address:
        try:
            parse_address(address)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--drive") from None
        return Drive.connect(address)
    with err.status("starting the embedded drive"):
        return Drive.embedded(time=time_mode.value)


Update = Callable[[int, int], None]  # done, in all


@contextmanager
def progress_bytes(what: str) -> Iterator[Update]:
    """A progress bar over bytes on standard error; gone when done."""
    with _bar(what, DownloadColumn(binary_units=True)) as update:
        yield update


@contextmanager
def progress_count(what: str) -> Iterator[Update]:
    """A progress bar over things counted."""
    with _bar(what, MofNCompleteColumn()) as update:
        yield update


@contextmanager
def _bar(what: str, amount: ProgressColumn) -> Iterator[Update]:
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update
