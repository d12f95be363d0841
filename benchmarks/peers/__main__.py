"""`python -m benchmarks.peers`: JSON, a table and a plot of all peers under one memory limit."""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from benchmarks.peers.checkpoint import (
    SHAPES,
    make_checkpoint,
    make_gguf,
    prompt_ids,
    weights_bytes,
)
from benchmarks.peers.course import Course, Finish
from benchmarks.peers.race import PEERS, race
from csd_protocol.units import format_size
from host_client.runtime.memory_limit import allowed
from host_client.runtime.refusals import RequestRefused

PROMPT_TOKENS = 16


class Report(BaseModel):
    shape: str
    bits: int
    weights_bytes: int
    budget_bytes: int
    allowance_bytes: int
    limit_bytes: int
    prompt_tokens: int
    tokens: int
    finishes: list[Finish]


def main() -> int:
    asked = _arguments()
    shape = SHAPES[asked.shape]
    out = Console(highlight=False)
    checkpoint = make_checkpoint(asked.folder / f"llama-{asked.shape}", shape)
    gguf = make_gguf(checkpoint, shape, asked.bits)
    size = weights_bytes(shape) if asked.bits == 16 else gguf.stat().st_size
    budget = int(size * asked.share / 100)
    course = Course(
        checkpoint=checkpoint,
        gguf=gguf,
        bits=asked.bits,
        budget_bytes=budget,
        limit_bytes=budget + allowed(0, budget),
        prompt=prompt_ids(PROMPT_TOKENS),
        tokens=asked.tokens,
        python=asked.python,
        node_modules=asked.node_modules.absolute(),
    )
    report = Report(
        shape=asked.shape,
        weights_bytes=size,
        bits=asked.bits,
        budget_bytes=budget,
        allowance_bytes=allowed(0, budget),
        limit_bytes=course.limit_bytes,
        prompt_tokens=PROMPT_TOKENS,
        tokens=asked.tokens,
        finishes=[],
    )
    try:
        for finish in race(course, asked.only or list(PEERS[asked.bits])):
            report.finishes.append(finish)
            out.print(f"{finish.peer}: {finish.failure or f'{finish.tokens_per_s:.3g} tokens/s'}")
    except RequestRefused as error:
        out.print(f"error: {error}", soft_wrap=True)
        return 1
    out.print(_table(report))
    asked.json.write_text(report.model_dump_json(indent=2))
    _plot(report, asked.plot)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.peers", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument(
        "--share", type=float, default=31.0, help="percent of the weights in memory"
    )
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--bits", type=int, choices=(16, 4), default=16, help="4: GGUF's Q4_0")
    parser.add_argument(
        "--only", nargs="+", choices=[name for peers in PEERS.values() for name in peers]
    )
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/flash-csd-peers"))
    parser.add_argument(
        "--python", type=Path, default=Path(sys.executable), help="interpreter with the peers"
    )
    parser.add_argument("--node-modules", type=Path, default=Path(".venv-peers/node_modules"))
    parser.add_argument("--json", type=Path, default=Path("peers.json"))
    parser.add_argument("--plot", type=Path, default=Path("peers.png"))
    return parser.parse_args()


def _table(report: Report) -> Table:
    table = Table(
        *("peer", "tokens/s", "prefill", "peak memory", "read a token", "of the disk", "what"),
        title=(
            f"LLaMA of {format_size(report.weights_bytes)}; limit {format_size(report.limit_bytes)}"
            f", {format_size(report.allowance_bytes)} of it for interpreter and libraries"
        ),
    )
    for finish in report.finishes:
        table.add_row(finish.peer, *_figures(finish))
    return table


def _figures(finish: Finish) -> tuple[str, ...]:
    if finish.failure is not None:
        return "", "", "", "", "", finish.failure
    drive = finish.drive_peak_bytes
    return (
        f"{finish.tokens_per_s:.3g}",
        f"{finish.prefill_s:.2f} s",
        format_size(finish.peak_bytes or 0) + (f" + drive {format_size(drive)}" if drive else ""),
        format_size(int(finish.read_bytes_per_token or 0)),
        _share_of_disk(finish),
        finish.version,
    )


def _share_of_disk(finish: Finish) -> str:
    """What was read a second, of what the disk gives large direct reads."""
    if not finish.disk_bytes_per_s:
        return ""
    read = (finish.tokens_per_s or 0) * (finish.read_bytes_per_token or 0)
    return f"{read / finish.disk_bytes_per_s:.0%} of {finish.disk_bytes_per_s / 1e9:.2f} GB/s"


def _plot(report: Report, path: Path) -> None:
    done = [finish for finish in report.finishes if finish.failure is None]
    figure = Figure(figsize=(7, 1 + 0.5 * len(done)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh([f.peer for f in done], [f.tokens_per_s or 0.0 for f in done])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel(
        f"tokens/s, {format_size(report.weights_bytes)} of weights within "
        f"{format_size(report.limit_bytes)}"
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
