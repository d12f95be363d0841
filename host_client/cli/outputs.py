"""Where else a command's figures may go: a file, a plot, a document."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from host_client.calibrate.plot import check_plot

Plot = Annotated[Path | None, typer.Option(help="Write a PNG here.")]
To = Annotated[Path | None, typer.Option(help="Write the JSON object here.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]


def check_outputs(plot: Path | None, to: Path | None) -> None:
    """Before minutes of work, not behind them."""
    for path, option in ((plot, "--plot"), (to, "--to")):
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no folder {path.parent}", param_hint=option)
    if plot is None:
        return
    try:
        check_plot()
    except ModuleNotFoundError as error:
        raise typer.BadParameter(str(error), param_hint="--plot") from None


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
