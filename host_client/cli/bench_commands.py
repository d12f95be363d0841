"""`csd bench`: what a quality setting costs."""

import json
from typing import Annotated

import typer
from rich.table import Table

from csd_protocol.units import format_size
from host_client.calibrate.comparison import QualityRow, compare_qualities
from host_client.calibrate.text import Split, default_text, token_windows
from host_client.cli.console import TimeMode, open_drive, out, progress_count
from host_client.cli.model_commands import load_tokenizer
from host_client.cli.options import Dram, DriveAddress, Json, Model, Time
from host_client.model.source import resolve_source
from host_client.runtime.causal_lm import LOOKAHEAD_DEFAULT

app = typer.Typer(help="Measurements on real text.")


@app.callback()
def _group() -> None:
    """Measurements on real text."""


@app.command()
def quality(
    model: Model,
    settings: Annotated[
        list[str] | None, typer.Option("--quality", help="Kept fractions to measure; repeatable.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of held-out text.", min=2)] = 2048,
    window: Annotated[int, typer.Option(help="Tokens a window.", min=2)] = 256,
    lookahead: Annotated[int, typer.Option(min=0, max=8)] = LOOKAHEAD_DEFAULT,
    dram: Dram = "45%",
    drive: DriveAddress = None,
    time: Time = TimeMode.VIRTUAL,
    as_json: Json = False,
) -> None:
    """Perplexity of kept fractions beside the dense model's, on held-out text."""
    source = resolve_source(model)
    text = default_text(Split.HELD_OUT)
    windows = token_windows(load_tokenizer(source), text, tokens, window)
    with open_drive(drive, time) as opened:
        rows = []
        for setting in ["exact", *(settings or ["0.5"])]:
            with progress_count(f"quality {setting}, tokens") as update:
                row = compare_qualities(
                    opened, source.name, setting, windows, dram, lookahead, update
                )
            rows.append(row)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "model": source.name,
                    "tokens": tokens,
                    "window": window,
                    "rows": [row.model_dump() for row in rows],
                }
            )
        )
        return
    out.print(_table(source.name, rows))


def _table(model: str, rows: list[QualityRow]) -> Table:
    dense = rows[0].perplexity
    table = Table(
        "quality",
        "perplexity",
        "against dense",
        "staged a token",
        "recall",
        title=model,
        title_justify="left",
    )
    for row in rows:
        recall = "-" if row.recall is None else f"{row.recall:.2f}"
        table.add_row(
            row.quality,
            f"{row.perplexity:.2f}",
            f"{row.perplexity / dense - 1:+.1%}",
            format_size(row.staged_bytes_per_token),
            recall,
        )
    return table
