"""`csd models`, `remove`, `plan` and `verify`: what lies on the drive, without torch."""

import json
from typing import Annotated

import typer
from rich.table import Table

from csd_protocol.packed import DirectoryEntry
from csd_protocol.units import format_size
from host_client.cli import reports
from host_client.cli.console import EXIT_DAMAGED, TimeMode, open_drive, out, progress_bytes
from host_client.cli.options import Dram, DriveAddress, Json, Model, Time
from host_client.driver import Drive
from host_client.model.catalog import (
    list_models,
    open_model,
    read_frequencies,
    read_manifest,
    remove_model,
)
from host_client.model.errors import DamagedRecord
from host_client.model.source import name_on_drive
from host_client.runtime.plain_reads import PlainReads
from host_client.runtime.plan import make_plan, parse_budget


def models(drive: DriveAddress = None, time: Time = TimeMode.VIRTUAL) -> None:
    """List the models on the drive."""
    table = Table("name", "state", "copies", "size")
    with open_drive(drive, time) as opened:
        for entry in list_models(opened):
            size = format_size(entry.extent.length_bytes)
            table.add_row(entry.name, entry.state, _copies(opened, entry), size)
    out.print(table)


def _copies(drive: Drive, entry: DirectoryEntry) -> str:
    try:
        return str(read_manifest(drive, entry).copies)
    except DamagedRecord:
        return "? (damaged)"


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
        frequencies = read_frequencies(opened, packed)
    made = make_plan(packed, parse_budget(dram, packed), context, frequencies)
    if as_json:
        typer.echo(json.dumps(reports.plan_object(packed, made)))
        return
    out.print(reports.plan_table(packed, made))
    verdict = reports.plan_verdict(packed, made)
    if verdict is not None:
        out.print(verdict, soft_wrap=True, markup=False)


def verify(
    model: Model,
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
    as_json: Json = False,
) -> None:
    """Read every unit of every copy of a model, and list the damaged ones."""
    with open_drive(drive, time) as opened:
        _, packed = open_model(opened, name_on_drive(model))
        with progress_bytes("verifying") as update:
            damage = PlainReads(opened, packed).verify(update)
    report = reports.verify_object(packed, damage)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        out.print(reports.verify_text(report))
    if damage:
        raise typer.Exit(EXIT_DAMAGED)
