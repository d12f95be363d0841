"""`csd generate --enforce`: the same command again, in a control group of its own.

The embedded drive's daemon is started here, outside of the group, since its memory is the drive's.
The command in the group sets the limit itself, once it knows its budget.
"""

import os
import signal
import subprocess
import sys

import typer

from csd_protocol.units import format_size
from host_client.cli.console import CSD, TimeMode, open_drive
from host_client.cli.options import DriveAddress, Time
from host_client.runtime.cgroup import VARIABLE, Cgroup, Hierarchy
from host_client.runtime.refusals import RequestRefused

app = typer.Typer(add_completion=False)


class OutOfMemory(RequestRefused):
    """The kernel ended the process at its limit."""


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def generate(
    context: typer.Context, drive: DriveAddress = None, time: Time = TimeMode.VIRTUAL
) -> None:
    """Generate text, the weights staged by the drive as they are needed."""
    with open_drive(drive, time) as opened, Cgroup.made(Hierarchy.find()) as group:
        words = [*CSD, "generate", *context.args, "--drive", opened.address]
        status = subprocess.run(
            group.command([sys.executable, *words]),
            env=os.environ | {VARIABLE: str(group.folder)},
            check=False,
        ).returncode
        if status == -signal.SIGKILL and group.kills:
            raise OutOfMemory(
                f"the kernel ended the process at its memory limit, "
                f"{format_size(group.peak_bytes)}: budget and allowance. Raise --dram"
            )
    raise typer.Exit(128 - status if status < 0 else status)
