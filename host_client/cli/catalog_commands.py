"""`csd models`, `remove`, `plan` and `verify`: what lies on the drive, without torch."""

import json
from typing import Annotated

import typer
from rich.table import Table

from csd_protocol.opcodes import Cns
from csd_protocol.packed import DirectoryEntry
from csd_protocol.units import format_size, parse_size
from host_client.cli import reports
from host_client.cli.console import EXIT_DAMAGED, TimeMode, open_drive, out, progress_bytes
from host_client.cli.options import Dram, DriveAddress, Json, Model, QualityText, Recent, Time
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
from host_client.runtime.quality import Quality
from host_client.runtime.recent_room import AUTO, RecentRoom
from host_client.runtime.token_time import (
    CLASSES,
    measure_host_rate,
    rates_of,
    token_time,
    volumes_of,
)

HostRate = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Bytes a second that the host computes with, like 40GB. Default: measured here.",
    ),
]


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
    quality: QualityText = "exact",
    lookahead: Annotated[
        int, typer.Option(help="Layers ahead that a kept fraction is predicted.", min=0, max=8)
    ] = 1,
    recent: Recent = AUTO,
    host_rate: HostRate = None,
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
    as_json: Json = False,
) -> None:
    """Print what would be resident and staged within a budget, and a token's time."""
    kept = Quality.parse(quality)
    host_bytes_per_s = parse_host_rate(host_rate)
    with open_drive(drive, time) as opened:
        _, packed = open_model(opened, name_on_drive(model))
        frequencies = read_frequencies(opened, packed)
        connected = rates_of(opened.identify(Cns.CONTROLLER))
    room = RecentRoom.of(recent, kept, bool(packed.experts))
    made = make_plan(packed, parse_budget(dram, packed), context, frequencies, room)
    volumes = volumes_of(packed, made, kept, frequencies)
    ahead = None if kept.exact else lookahead
    times = [token_time(volumes, rates, host_bytes_per_s, ahead) for rates in (*CLASSES, connected)]
    if as_json:
        told = reports.plan_object(packed, made)
        told |= reports.times_object(times, kept, host_bytes_per_s)
        typer.echo(json.dumps(told))
        return
    out.print(reports.plan_table(packed, made))
    out.print(reports.times_table(times, kept, host_bytes_per_s))
    verdict = reports.plan_verdict(packed, made)
    if verdict is not None:
        out.print(verdict, soft_wrap=True, markup=False)


def parse_host_rate(text: str | None) -> float:
    """Bytes a second; None: measured here. Raises BadParameter."""
    if text is None:
        return measure_host_rate()
    try:
        rate = parse_size(text.removesuffix("/s"))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--host-rate") from None
    if rate <= 0:
        raise typer.BadParameter("a rate is above 0", param_hint="--host-rate")
    return rate


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
