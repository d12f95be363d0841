"""Quality against staged bytes a token, one curve a program, as a PNG."""

from collections import defaultdict
from pathlib import Path

from host_client.calibrate.lab import LabReport, Outcome

_MIB = 1 << 20


def check_plot() -> None:
    """Raises ModuleNotFoundError that says what a plot needs, where it is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        needed = "a plot needs matplotlib: pip install 'flash-csd[plot]'"
        raise ModuleNotFoundError(needed) from error


def write_plot(report: LabReport, title: str, path: Path) -> None:
    """A PNG at `path`. Raises ModuleNotFoundError as `check_plot` does."""
    check_plot()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for program, outcomes in _curves(report).items():
        axes.plot(
            [outcome.staged_bytes_per_token / _MIB for outcome in outcomes],
            [100 * outcome.against_dense for outcome in outcomes],
            marker="o",
            linestyle="--" if program.startswith("oracle") else "-",
            label=program,
        )
    dense = report.dense_bytes_per_token / _MIB
    axes.axhline(0, color="black", linewidth=1, label=f"dense ({dense:.0f} MiB of FFN a token)")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel("staged a token, MiB")
    axes.set_ylabel("perplexity above dense, %")
    axes.set_title(f"{title}: {report.scored} positions, dense {report.dense_perplexity:.2f}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=120)


def _curves(report: LabReport) -> dict[str, list[Outcome]]:
    """Each program's outcomes by staged bytes."""
    curves: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in sorted(report.outcomes, key=lambda outcome: outcome.staged_bytes_per_token):
        curves[outcome.program].append(outcome)
    return curves
