"""The headline table as a picture: memory of each model, conventional, as budgeted, as measured."""

from dataclasses import dataclass
from pathlib import Path

from host_client.calibrate.headline import GB
from host_client.calibrate.plot import check_plot

_BAR = 0.27
_COLOURS = ("0.75", "tab:blue", "tab:orange")


@dataclass(frozen=True, slots=True)
class Bars:
    """Of one model, in bytes. peak_bytes: what the kernel measured; None: nothing was run."""

    title: str
    conventional_bytes: int
    budget_bytes: int
    peak_bytes: int | None


def write_headline_plot(bars: list[Bars], path: Path) -> None:
    """A PNG at `path`. Raises ModuleNotFoundError as `check_plot` does."""
    check_plot()
    from matplotlib.figure import Figure

    series = {
        "conventional": [of.conventional_bytes for of in bars],
        "budget with the drive": [of.budget_bytes for of in bars],
        "peak, process and all": [of.peak_bytes or 0 for of in bars],
    }
    figure = Figure(figsize=(8, 1 + 0.9 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    for number, (label, sizes) in enumerate(series.items()):
        if not any(sizes):
            continue
        places = [row + (number - 1) * _BAR for row in range(len(bars))]
        values = [size / GB for size in sizes]
        drawn = axes.barh(places, values, _BAR, label=label, color=_COLOURS[number])
        axes.bar_label(drawn, [f"{value:.1f}" if value else "" for value in values], padding=3)
    axes.set_yticks(range(len(bars)), [of.title for of in bars])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("host memory, GB")
    figure.legend(loc="outside upper center", ncols=len(series))
    figure.savefig(path, format="png", dpi=120)
