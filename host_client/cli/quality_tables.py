"""The table of `csd bench quality`, for a terminal and for a document."""

from rich.table import Table

from csd_protocol.units import format_size
from host_client.calibrate.outcome import Outcome, QualityReport
from host_client.cli.outputs import markdown_table

_COLUMNS = (
    *("setting", "perplexity", "against dense", "same token", "KL, nats"),
    *("recall", "precision", "top third", "staged a token"),
)


def quality_table(model: str, report: QualityReport) -> Table:
    table = Table(*_COLUMNS, title=f"{model}: {_heading(report)}", title_justify="left")
    for row in report.outcomes:
        table.add_row(*_cells(row))
    return table


def quality_markdown(report: QualityReport) -> str:
    """The same as a Markdown table below its heading line."""
    table = markdown_table(_COLUMNS, map(_cells, report.outcomes))
    return f"{_heading(report)}:\n\n{table}"


def _heading(report: QualityReport) -> str:
    dense_size = format_size(report.dense_bytes_per_token)
    return (
        f"{report.tokens:,} tokens ({report.scored:,} positions), dense perplexity "
        f"{report.dense_perplexity:.2f} at {dense_size} a token"
    )


def _cells(row: Outcome) -> list[str]:
    return [
        row.name,
        f"{row.perplexity:.2f}",
        f"{row.against_dense:+.1%}",
        f"{row.agreement:.1%}",
        f"{row.kl_nats:.4f}",
        *(_share(value) for value in (row.recall, row.precision, row.recall_third)),
        format_size(row.staged_bytes_per_token),
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
