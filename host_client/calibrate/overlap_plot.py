"""What host and drive do at the same time, as a picture: a lane each, a few tokens long."""

from pathlib import Path

from host_client.calibrate.overlap import COMPUTING, READING, WAITING, Overlap
from host_client.calibrate.plot import check_plot

DRAWN_TOKENS = 3
_COLOURS = {COMPUTING: "tab:blue", WAITING: "tab:red", READING: "tab:cyan"}
_LANE, _GAP_US = 0.8, 5.0  # spans nearer to each other are drawn as one


def write_overlap_plot(overlap: Overlap, path: Path) -> None:
    """A PNG at `path`. Raises ModuleNotFoundError as `check_plot` does."""
    check_plot()
    from matplotlib.figure import Figure

    starts = overlap.token_starts_us
    begin_us = starts[0]
    end_us = starts[DRAWN_TOKENS] if len(starts) > DRAWN_TOKENS else overlap.end_us
    figure = Figure(figsize=(11, 1.2 + 0.45 * len(overlap.lanes)), layout="constrained")
    axes = figure.add_subplot()
    for row, (name, spans) in enumerate(overlap.lanes.items()):
        bars = [
            ((start - begin_us) / 1000, max(end - start, _GAP_US) / 1000)
            for start, end in spans.tolist()
            if end > begin_us and start < end_us
        ]
        colour = _COLOURS.get(name, "tab:orange")
        axes.broken_barh(bars, (row - _LANE / 2, _LANE), color=colour, linewidth=0)
    for start in starts:
        if start < end_us:
            axes.axvline((start - begin_us) / 1000, color="0.4", linewidth=0.8)
    axes.set_yticks(range(len(overlap.lanes)), list(overlap.lanes))
    axes.invert_yaxis()
    axes.set_xlim(0, (end_us - begin_us) / 1000)
    axes.set_xlabel("ms; a vertical line is the start of a token")
    shorter = "compute behind the drive" if overlap.is_drive_longer else "the drive behind compute"
    axes.set_title(f"{100 * overlap.hidden:.0f} % hidden ({shorter}), {overlap.tokens} tokens")
    figure.savefig(path, format="png", dpi=120)
