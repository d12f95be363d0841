"""`csd log` and `csd trace`: what the drive remembers, and what it does right now."""

import json
import os
import subprocess
import time as host_time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from csd_protocol.opcodes import LogPage
from host_client.cli.console import DRIVE_VARIABLE, TimeMode, err, open_drive, out
from host_client.cli.log_tables import TABLES
from host_client.cli.options import DriveAddress, Json, Time
from host_client.driver import Drive
from host_client.driver.drive import TRACE_SPANS


class Log(StrEnum):
    SMART = "smart"
    ERROR = "error"
    STAGE = "stage"
    EVENTS = "events"
    TELEMETRY = "telemetry"
    ENDURANCE = "endurance"

    @property
    def page(self) -> LogPage:
        return LogPage[self.name]


def log(
    page: Annotated[Log, typer.Argument(help="Which log page.")],
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
    follow: Annotated[
        bool, typer.Option("--follow", help="With events: go on with what happens, until Ctrl-C.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print a log page: smart, error, stage, events, telemetry or endurance."""
    if follow and page is not Log.EVENTS:
        raise typer.BadParameter("goes with the page `events`", param_hint="--follow")
    with open_drive(drive, time) as opened:
        answer = opened.log_page(page.page)
        _print(page, answer, as_json)
        if follow:
            _follow(opened, answer, as_json)


def _print(page: Log, answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(answer))
        return
    for table in TABLES[page.value](answer):
        out.print(table)


def _follow(drive: Drive, shown: dict[str, Any], as_json: bool) -> None:
    """Each asynchronous event, and what is new in the event log since."""
    while True:
        told = drive.wait_event()
        assert told is not None
        if not as_json:
            out.print(f"[bold]{told}[/]")
        if told.log_id != LogPage.EVENTS:
            drive.log_page(told.log_id)  # so that the next one of its type is told
        answer = drive.log_page(LogPage.EVENTS)
        new = answer["total_number_of_events"] - shown["total_number_of_events"]
        shown = answer
        if new:
            _print(Log.EVENTS, {**answer, "events": answer["events"][:new]}, as_json)


def trace(
    file: Annotated[Path, typer.Argument(help="Where the trace goes, as JSON.", dir_okay=False)],
    command: Annotated[
        list[str] | None,
        typer.Argument(help="After --: a command to run meanwhile, with CSD_DRIVE set."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="How long, when no command is named.", min=0)
    ] = None,
    spans: Annotated[int, typer.Option(help="Spans kept at most.", min=1)] = TRACE_SPANS,
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
) -> None:
    """Record what the drive does, for ui.perfetto.dev.

    csd trace t.json -- csd generate MODEL --prompt TEXT, or csd trace t.json --seconds 10
    """
    if bool(command) == (seconds is not None):
        raise typer.BadParameter("name either --seconds, or a command after --")
    status = 0
    with open_drive(drive, time) as opened:
        with opened.traced(spans):
            if command:
                environment = {**os.environ, DRIVE_VARIABLE: opened.address}
                status = subprocess.run(command, env=environment, check=False).returncode
            else:
                host_time.sleep(seconds or 0)
        write_trace(file, opened.log_page(LogPage.TRACE))
    if status:
        raise typer.Exit(status)


def write_trace(file: Path, page: dict[str, Any]) -> None:
    """Writes it and says so. Raises OSError."""
    file.write_text(json.dumps(page, separators=(",", ":")))
    left_out = page["otherData"]["spans_left_out"]
    err.print(
        f"wrote {file}: {len(page['traceEvents']):,} events. Open it at https://ui.perfetto.dev"
        + (f"; {left_out:,} spans more had no room (--spans)" if left_out else ""),
        soft_wrap=True,
    )
