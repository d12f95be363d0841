"""`csd identify`: what the drive says of itself."""

import json
from typing import Any

import typer
from rich.table import Table

from csd_protocol.opcodes import Cns
from host_client.cli.console import TimeMode, open_drive, out
from host_client.cli.options import DriveAddress, Json, Time


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
