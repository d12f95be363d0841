"""The command line `csd-device`."""

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from csd_device.clock import Clock, TimeMode, VirtualClock, WallClock
from csd_device.config import DriveConfig, load_config, preset_names, preset_text
from csd_device.drive import Drive
from csd_device.errors import DriveRefused
from csd_device.service import daemon
from csd_device.service import health as health_check
from csd_device.service.read_threads import in_threads
from csd_device.service.rehearsal import rehearse
from csd_device.service.workload_command import workload
from csd_protocol.address import Address, TcpAddress, parse_address
from csd_protocol.units import format_size

app = typer.Typer(
    help="An emulated computational storage drive.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_EXIT_REFUSED = 1
_EXIT_USAGE = 2


def main() -> NoReturn:
    """Runs the command line and ends the process.

    By then everything is closed and on disk; taking the compiled kernels and gRPC apart, module by
    module, would keep a host that waits for its own daemon half a second longer.
    """
    try:
        app()
    except SystemExit as ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 0)
    raise AssertionError("a command line ends with SystemExit")


@app.callback()
def _commands() -> None:
    """Keeps `serve` a command of its own."""


@app.command()
def drives(
    name: Annotated[str | None, typer.Argument(help="One drive, by name or TOML file.")] = None,
    toml: Annotated[
        bool, typer.Option("--toml", help="Print that preset's TOML, to start your own from.")
    ] = False,
) -> None:
    """List the drives that come along: capacity, channels x dies x planes, cell, what it is."""
    try:
        if toml and name:
            typer.echo(preset_text(name), nl=False)
            return
        for each in [name] if name else preset_names():
            typer.echo("\t".join(_described(load_config(each))))
    except DriveRefused as error:
        Console(stderr=True, highlight=False).print(f"[red]refused:[/] {error}", soft_wrap=True)
        raise typer.Exit(_EXIT_REFUSED) from None


def _described(config: DriveConfig) -> tuple[str, ...]:
    capacity = f"{config.capacity_bytes / 1e9:,.1f} GB"
    return (
        config.name,
        capacity,
        config.geometry.layout,
        config.timing.cell.value,
        config.description,
    )


@app.command()
def serve(
    drive: Annotated[str, typer.Option(help="A drive's name (`csd-device drives`) or TOML file.")],
    media: Annotated[Path, typer.Option(help="Folder of the drive's media; made when missing.")],
    listen: Annotated[str, typer.Option(help="unix:PATH or HOST:PORT.")],
    time: Annotated[TimeMode, typer.Option(help="How modelled time is kept.")] = TimeMode.OFF,
    window: Annotated[
        Path | None, typer.Option(help="File of the window; by default on /dev/shm.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="HOST:PORT of Prometheus metrics; none by default.")
    ] = None,
    allow_remote: Annotated[
        bool, typer.Option(help="Listen where other machines can reach it, without encryption.")
    ] = False,
    stop_with_stdin: Annotated[
        bool, typer.Option(help="Stop at the end of standard input, when the parent has died.")
    ] = False,
) -> None:
    """Serve a drive until SIGTERM or Ctrl-C."""
    said = Console(stderr=True, highlight=False)
    address = _checked_address("--listen", listen, allow_remote, said)
    scraped = _checked_metrics(metrics, allow_remote, said)
    try:
        config = load_config(drive)
        _run(config, media, window, address, scraped, time, stop_with_stdin, said)
    except DriveRefused as error:
        said.print(f"[red]refused:[/] {error}", soft_wrap=True)
        raise typer.Exit(_EXIT_REFUSED) from None


app.command()(workload)


@app.command()
def health(
    connect: Annotated[str, typer.Option(help="The daemon: unix:PATH or HOST:PORT.")],
) -> None:
    """Ask a daemon whether its drive serves; exit status 1 when not."""
    serves, answer = health_check.ask(_parsed("--connect", connect))
    typer.echo(answer, err=True)
    raise typer.Exit(0 if serves else _EXIT_REFUSED)


def _run(
    config: DriveConfig,
    media: Path,
    window: Path | None,
    address: Address,
    metrics: TcpAddress | None,
    time: TimeMode,
    stop_with_stdin: bool,
    said: Console,
) -> None:
    clock: Clock = VirtualClock() if time is TimeMode.VIRTUAL else WallClock()
    opened = Drive.open(
        config, media, clock=clock, time_mode=time, window_path=window, begin=in_threads()
    )
    try:
        rehearse()

        def ready(bound: Address, scraped: TcpAddress | None) -> None:
            typer.echo(f"ready: {config.name} at {bound}, window {opened.window_path}")
            if scraped:
                typer.echo(f"metrics: http://{scraped}/metrics")
            said.print(
                f"{config.description}: {format_size(config.capacity_bytes)} at {media}, "
                f"time {time.value}",
                soft_wrap=True,
            )

        daemon.serve(opened, address, metrics, ready, stop_with_stdin)
    finally:
        opened.close()


def _parsed(option: str, text: str) -> Address:
    try:
        return parse_address(text)
    except ValueError as error:
        Console(stderr=True, highlight=False).print(f"[red]{option}:[/] {error}", soft_wrap=True)
        raise typer.Exit(_EXIT_USAGE) from None


def _checked_metrics(metrics: str | None, allow_remote: bool, said: Console) -> TcpAddress | None:
    if metrics is None:
        return None
    address = _checked_address("--metrics", metrics, allow_remote, said)
    if not isinstance(address, TcpAddress):
        said.print(f"[red]--metrics:[/] {metrics} is no HOST:PORT", soft_wrap=True)
        raise typer.Exit(_EXIT_USAGE)
    return address


def _checked_address(option: str, text: str, allow_remote: bool, said: Console) -> Address:
    address = _parsed(option, text)
    if isinstance(address, TcpAddress) and not address.is_loopback and not allow_remote:
        said.print(
            f"[red]{option}:[/] other machines can reach {address}, and nothing protects the "
            "drive from them. Use a loopback address or unix:PATH, or say --allow-remote",
            soft_wrap=True,
        )
        raise typer.Exit(_EXIT_USAGE)
    return address
