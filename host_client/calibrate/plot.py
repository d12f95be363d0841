"""Quality against staged bytes a token, one curve a program, and recall by layer: a PNG."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from host_client.calibrate.outcome import Outcome, QualityReport

_MIB = 1 << 20
_LOSS_LEAST = 0.1  # percent: what is lower, or no loss at all, is drawn here
_LINES = ("-", "--", "-.", ":")
_MARKERS = "osD^vPX*<>hp"
_COLOURS = "tab10"
_DENSE, _BOUND = "black", "0.45"


def check_plot() -> None:
    """Raises ModuleNotFoundError that says what a plot needs, where it is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        needed = "a plot needs matplotlib: pip install 'flash-csd[plot]'"
        raise ModuleNotFoundError(needed) from error


def write_plot(report: QualityReport, title: str, path: Path) -> None:
    """A PNG at `path`. Raises ModuleNotFoundError as `check_plot` does."""
    check_plot()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 12), layout="constrained")
    losses, recalls = figure.subplots(2, height_ratios=(3, 2))
    styles = _styles(report)
    _draw_losses(losses, report, styles)
    _draw_recalls(recalls, report, styles)
    dense = f"{report.scored:,} positions, dense perplexity {report.dense_perplexity:.2f}"
    figure.suptitle(f"{title}: what leaving FFN units out costs ({dense})")
    figure.savefig(path, format="png", dpi=120)


def _curves(report: QualityReport) -> dict[str, list[Outcome]]:
    """Each program's outcomes by staged bytes."""
    curves: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in sorted(report.outcomes, key=lambda outcome: outcome.staged_bytes_per_token):
        curves[outcome.program].append(outcome)
    return curves


def _styles(report: QualityReport) -> dict[str, dict[str, Any]]:
    """How each curve is drawn: told apart by line and marker too, so that grey is enough."""
    from matplotlib import colormaps

    styles: dict[str, dict[str, Any]] = {}
    for number, program in enumerate(_curves(report)):
        bound = program.startswith("oracle")
        styles[program] = {
            "color": _BOUND if bound else colormaps[_COLOURS](number % 10),
            "linestyle": (0, (1, 1)) if bound else _LINES[number // 3 % len(_LINES)],
            "marker": "o" if bound else _MARKERS[number % len(_MARKERS)],
            "linewidth": 3 if bound else 1.6,
        }
    return styles


def _draw_losses(axes: Any, report: QualityReport, styles: dict[str, dict[str, Any]]) -> None:
    """Perplexity above the dense model's, in percent, on a logarithmic axis."""
    dense = report.dense_bytes_per_token / _MIB
    ends = []
    for program, outcomes in _curves(report).items():
        staged = [outcome.staged_bytes_per_token / _MIB for outcome in outcomes]
        lost = [max(_LOSS_LEAST, 100 * outcome.against_dense) for outcome in outcomes]
        axes.plot(staged, lost, **styles[program])
        ends.append((staged[-1], lost[-1], program, styles[program]["color"]))
    axes.axhline(_LOSS_LEAST, color=_DENSE, linewidth=3)
    axes.plot([dense], [_LOSS_LEAST], "s", color=_DENSE, markersize=10, clip_on=False)
    ends.append((dense, _LOSS_LEAST * 1.05, "dense", _DENSE))
    axes.set_yscale("log")
    axes.set_ylim(_LOSS_LEAST, None)
    axes.set_xlim(0, dense * 1.02)
    axes.yaxis.set_major_formatter(_percent)
    axes.set_xlabel("staged a token, MiB of FFN units at 16 bits")
    axes.set_ylabel("perplexity above dense")
    axes.grid(alpha=0.3, which="both")
    _label(axes, ends)


def _percent(value: float, _: int) -> str:
    return f"+{value:g} %" if value > _LOSS_LEAST else "none"


def _draw_recalls(axes: Any, report: QualityReport, styles: dict[str, dict[str, Any]]) -> None:
    """Recall of the true top third by layer; of each curve the setting that keeps most."""
    ends = []
    for program, outcomes in _curves(report).items():
        layers = outcomes[-1].layers
        recalls = [of.recall if of.recall_third is None else of.recall_third for of in layers]
        known = [(of.layer, value) for of, value in zip(layers, recalls, strict=True) if value]
        if known and not program.startswith("oracle"):
            axes.plot(*zip(*known, strict=True), **styles[program], markersize=4)
            ends.append((float(known[-1][0]), known[-1][1], program, styles[program]["color"]))
    axes.set_xlabel("layer")
    axes.set_ylabel("recall of the true top third")
    axes.grid(alpha=0.3)
    _label(axes, ends)


def _label(axes: Any, ends: list[tuple[float, float, str, Any]]) -> None:
    """Each curve's name at the right edge, a line to its end; names keep off each other."""
    if not ends:
        return
    axes.get_ylim()  # settles the limits, which the places hang on
    to_axes = axes.transData + axes.transAxes.inverted()
    places = sorted(
        (float(to_axes.transform((x, y))[1]), x, y, text, colour) for x, y, text, colour in ends
    )
    apart = 1 / max(24, len(ends) + 1)
    top = 1.0 + apart
    heights: list[float] = []
    for height, *_ in places:  # from below, each above the one before
        heights.append(max(height, heights[-1] + apart if heights else 0.0))
    for index in range(len(heights) - 1, -1, -1):  # and pushed back where the panel ends
        top = heights[index] = min(heights[index], top - apart)
    for height, (_, x, y, text, colour) in zip(heights, places, strict=True):
        axes.annotate(
            text,
            (x, y),
            (1.02, height),
            textcoords="axes fraction",
            va="center",
            fontsize="small",
            color=colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.35, "linewidth": 0.8},
        )
