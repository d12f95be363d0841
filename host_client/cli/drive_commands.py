"""`csd identify` and `csd log`: what the drive says of itself."""

import json
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.table import Table

from csd_protocol.opcodes import Cns, LogPage
from host_client.cli.console import TimeMode, open_drive, out
from host_client.cli.options import DriveAddress, Json, Time


class Log(StrEnum):
    SMART = "smart"
    ERROR = "error"
    STAGE = "stage"


_LOG_PAGES = {Log.SMART: LogPage.SMART, Log.ERROR: LogPage.ERROR, Log.STAGE: LogPage.STAGE}


def identify(
    drive: DriveAddress = None, time: Time = TimeMode.VIRTUAL, as_json: Json = False
) -> None:
    """Print controller, namespace, window and loaded programs."""
    with open_drive(drive, time) as opened:
        answers = {cns.name.lower(): opened.identify(cns) for cns in Cns}
    if as_json:
        typer.echo(json.dumps(answers))
        return
    for title, answer in answers.items():
        _print(title, answer)


def log(
    page: Annotated[Log, typer.Argument(help="Which log page.")],
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
    as_json: Json = False,
) -> None:
    """Print a log page: smart, error or stage."""
    with open_drive(drive, time) as opened:
        answer = opened.log_page(_LOG_PAGES[page])
    if as_json:
        typer.echo(json.dumps(answer))
        return
    _print(page.value, answer)


def _print(title: str, answer: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("field", style="bold")
    table.add_column("value")
    for name, value in _flat("", answer):
        table.add_row(name, value)
    out.print(table)


def _flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    """Nested objects and lists as dotted names and text."""
    if isinstance(value, dict) and value:
        return [row for key, part in value.items() for row in _flat(f"{prefix}.{key}", part)]
    if isinstance(value, list) and value:
        return [row for key, part in enumerate(value) for row in _flat(f"{prefix}.{key}", part)]
    return [(prefix.removeprefix("."), str(value))]
