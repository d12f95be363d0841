"""`csd faults`: break a running drive on purpose, and see what that did."""

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from host_client.cli.console import TimeMode, open_drive, out
from host_client.cli.options import DriveAddress, Json, Time
from host_client.driver import Drive

app = typer.Typer(
    help="Faults of the drive: show, set and clear.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_COUNTERS = "counters"
_SEED = "seed"


@app.command()
def show(drive: DriveAddress = None, time: Time = TimeMode.VIRTUAL, as_json: Json = False) -> None:
    """Print which faults are on, and what they did since the drive was opened."""
    with open_drive(drive, time) as opened:
        _tell(opened, as_json)


@app.command("set")
def set_fault(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A fault; `csd faults show` lists them.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Its settings, values as JSON: rate=1e-3 psas=[[0,8]]. `seed=N` is all faults'.",
        ),
    ] = None,
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
    as_json: Json = False,
) -> None:
    """Switch one fault on, with its defaults where nothing else is said."""
    wanted = dict(_setting(text) for text in settings or [])
    seed = wanted.pop(_SEED, None)
    with open_drive(drive, time) as opened:
        opened.set_faults(name, wanted, seed)
        _tell(opened, as_json)


@app.command()
def clear(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A fault; none: all of them.")
    ] = None,
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
    as_json: Json = False,
) -> None:
    """Switch one fault off, or all."""
    with open_drive(drive, time) as opened:
        if name is None:
            opened.clear_faults()
        else:
            opened.set_faults(name, None)
        _tell(opened, as_json)


def _setting(text: str) -> tuple[str, Any]:
    """Raises BadParameter for what is no KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise typer.BadParameter(f"{text!r} is no KEY=VALUE", param_hint="KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(
            f"{key}: {value!r} is no JSON: {error}", param_hint="KEY=VALUE"
        ) from None


def _tell(opened: Drive, as_json: bool) -> None:
    """The faults as they are now; by default without the settings of those that are off."""
    faults = opened.faults()
    if as_json:
        typer.echo(json.dumps(faults))
        return
    table = Table(title=f"faults of {opened.address}", title_justify="left", show_header=False)
    table.add_column("name", style="bold")
    table.add_column("settings")
    counters = faults.pop(_COUNTERS)
    for name, settings in faults.items():
        table.add_row(name, "off" if settings is None else _listed(settings))
    for name, value in counters.items():
        table.add_row(f"{_COUNTERS}.{name}", f"{value:,}")
    out.print(table)


def _listed(settings: Any) -> str:
    if not isinstance(settings, dict):
        return str(settings)
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
