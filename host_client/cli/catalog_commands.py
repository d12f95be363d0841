"""`csd models`, `remove` and `plan`: what lies on the drive, without torch."""

import json
from typing import Annotated

import typer
from rich.table import Table

from csd_protocol.units import format_size
from host_client.cli import reports
from host_client.cli.console import TimeMode, open_drive, out
from host_client.cli.options import Dram, DriveAddress, Json, Model, Time
from host_client.model.catalog import list_models, open_model, remove_model
from host_client.model.source import name_on_drive
from host_client.runtime.plan import make_plan, parse_budget


def models(drive: DriveAddress = None, time: Time = TimeMode.VIRTUAL) -> None:
    """List the models on the drive."""
    with open_drive(drive, time) as opened:
        entries = list_models(opened)
    table = Table("name", "state", "size")
    for entry in entries:
        table.add_row(entry.name, entry.state, format_size(entry.extent.length_bytes))
    out.print(table)


def remove(model: Model, drive: DriveAddress = None, time: Time = TimeMode.VIRTUAL) -> None:
    """Take a model off the drive."""
    with open_drive(drive, time) as opened:
        remove_model(opened, name_on_drive(model))
    out.print(f"removed {model}")


def plan(
    model: Model,
    dram: Dram = "45%",
    context: Annotated[int, typer.Option(help="Tokens the KV cache has room for.", min=1)] = 512,
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
    as_json: Json = False,
) -> None:
    """Print what would be resident and what staged within a budget."""
    with open_drive(drive, time) as opened:
        _, packed = open_model(opened, name_on_drive(model))
    made = make_plan(packed, parse_budget(dram, packed), context)
    if as_json:
        typer.echo(json.dumps(reports.plan_object(packed, made)))
        return
    out.print(reports.plan_table(packed, made))
