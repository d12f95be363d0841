"""The command table and what each kind of failure exits with.

Exit status: 0 done; 1 a file that cannot be read or written; 2 a command line that does not parse;
3 the model (files, packing); 4 the drive or the way to it; 5 a request that cannot be met (budget,
quality, context); 6 units of a model that are damaged or lost on the drive; 130 interrupted.
"""

import os
import sys
from contextlib import suppress
from typing import ClassVar, NoReturn

import typer
from rich.markup import escape

from host_client.cli.console import EXIT_DAMAGED, EXIT_REQUEST, err
from host_client.cli.on_demand import Entry, Launcher, OnDemandGroup
from host_client.driver import DriveError
from host_client.io import ReaderError
from host_client.model.errors import ModelError
from host_client.runtime.cgroup import VARIABLE
from host_client.runtime.checksums import UnitCorrupt
from host_client.runtime.copies import UnitsLost
from host_client.runtime.refusals import RequestRefused

EXIT_DONE, EXIT_FILE, EXIT_MODEL, EXIT_DRIVE, EXIT_INTERRUPTED = 0, 1, 3, 4, 130

_CLI = "host_client.cli"
_GENERATE = "Generate text, the weights staged by the drive as they are needed."


class Commands(OnDemandGroup):
    table: ClassVar[dict[str, Entry]] = {
        "pack": Entry(
            f"{_CLI}.model_commands",
            "pack",
            "Pack a model onto the drive: units, checksums, frequencies, predictors.",
        ),
        "models": Entry(f"{_CLI}.catalog_commands", "models", "List the models on the drive."),
        "remove": Entry(f"{_CLI}.catalog_commands", "remove", "Take a model off the drive."),
        "plan": Entry(
            f"{_CLI}.catalog_commands",
            "plan",
            "Print what would be resident and staged within a budget, and a token's time.",
        ),
        "table": Entry(
            f"{_CLI}.table_commands",
            "table",
            "The headline table: models of full size within a fraction of their memory.",
        ),
        "generate": Entry(
            f"{_CLI}.model_commands",
            "generate",
            _GENERATE,
            Launcher("--enforce", VARIABLE, Entry(f"{_CLI}.enforced", "app", _GENERATE)),
        ),
        "verify": Entry(
            f"{_CLI}.catalog_commands",
            "verify",
            "Read every unit of every copy of a model, and list the damaged ones.",
        ),
        "identify": Entry(
            f"{_CLI}.drive_commands",
            "identify",
            "Print controller, namespace, window and loaded programs.",
        ),
        "log": Entry(
            f"{_CLI}.log_commands",
            "log",
            "Print a log page: smart, error, stage, events, telemetry or endurance.",
        ),
        "trace": Entry(
            f"{_CLI}.log_commands",
            "trace",
            "Record what the drive does, for ui.perfetto.dev.",
        ),
        "overlap": Entry(
            f"{_CLI}.overlap_commands",
            "overlap",
            "Say how much of the drive's work hides behind compute, or the reverse.",
        ),
        "faults": Entry(
            f"{_CLI}.fault_commands", "app", "Faults of the drive: show, set and clear."
        ),
        "calibrate": Entry(
            f"{_CLI}.calibrate_commands",
            "calibrate",
            "Measure on text how often each neuron is wanted and what leaving some out costs.",
        ),
        "place": Entry(
            f"{_CLI}.calibrate_commands",
            "place",
            "Lay neurons that are wanted together side by side; needs `csd calibrate`.",
        ),
        "predictor": Entry(
            f"{_CLI}.predictor_commands",
            "app",
            "Predictors: build, load, list and score the programs on the drive.",
        ),
        "bench": Entry(f"{_CLI}.bench_commands", "app", "Measurements on real text."),
    }


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _csd() -> None:
    """LLM inference from a computational storage drive."""


def main() -> NoReturn:
    """Entry point of `csd`; ends the process.

    By then drives are closed. Taking torch apart module by module would only keep the user waiting
    for a second more.
    """
    status = _run()
    with suppress(BrokenPipeError):  # whoever read the output has seen enough
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _run() -> int:
    """One command; its exit status."""
    try:
        app()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else EXIT_DONE
    except ModelError as error:
        return _refuse(error, EXIT_MODEL)
    except UnitsLost as error:
        return _refuse(error, EXIT_DAMAGED)
    except (DriveError, ReaderError, UnitCorrupt) as error:
        return _refuse(error, EXIT_DRIVE)
    except RequestRefused as error:
        return _refuse(error, EXIT_REQUEST)
    except OSError as error:
        return _refuse(error, EXIT_FILE)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_DONE


def _refuse(error: Exception, status: int) -> int:
    err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
    return status
