"""`csd-device workload`: fills a drive, runs a workload in virtual time, prints figures."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from csd_device.clock import TimeMode, VirtualClock
from csd_device.config import DriveConfig, load_config
from csd_device.drive import Drive
from csd_device.errors import DriveRefused
from csd_device.ftl.translation import Wrap
from csd_device.nand.media import HollowMedia
from csd_device.workload import report
from csd_device.workload.fio_job import parse_fio
from csd_device.workload.msr_trace import Played, play_trace
from csd_device.workload.patterns import Job, Pattern, WorkloadRefused
from csd_device.workload.runner import Outcome, age, fill, run_jobs
from csd_protocol.units import MIB, NS_PER_S, format_ns, format_size, parse_size

FILLED = 0.7  # of a temporary drive, unless said otherwise
_READ_SHARE = {
    Pattern.RANDREAD: 1.0,
    Pattern.SEQREAD: 1.0,
    Pattern.RANDWRITE: 0.0,
    Pattern.SEQWRITE: 0.0,
}
_RANDOM = {Pattern.RANDREAD, Pattern.RANDWRITE, Pattern.MIXED}
_EXIT_REFUSED = 1
Tell = Callable[[int, int], None]


def workload(
    drive: Annotated[str, typer.Option(help="A drive's name (`csd-device drives`) or TOML file.")],
    media: Annotated[
        Path | None, typer.Option(help="Folder of a drive's media; by default a temporary drive.")
    ] = None,
    pattern: Annotated[Pattern | None, typer.Option(help="What the requests are.")] = None,
    fio: Annotated[Path | None, typer.Option(help="Instead: a fio job file.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Instead: a block trace, MSR Cambridge CSV, also .gz.")
    ] = None,
    size: Annotated[str, typer.Option(help="Bytes of a request: 4096, 16KiB.")] = "4KiB",
    depth: Annotated[int, typer.Option(min=1, max=65536, help="Requests under way.")] = 1,
    read_share: Annotated[
        float, typer.Option(min=0, max=1, help="Of the pattern mixed: part that are reads.")
    ] = 0.7,
    requests: Annotated[int | None, typer.Option(min=1, help="How many requests.")] = None,
    seconds: Annotated[float | None, typer.Option(help="How long, on the drive's clock.")] = None,
    precondition: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Part of the namespace to write first, in order; 0.7 on a temporary drive.",
        ),
    ] = None,
    age_by: Annotated[
        float,
        typer.Option("--age", min=0, help="Then overwrite that part at random, this many times."),
    ] = 0.0,
    overwrite: Annotated[
        bool, typer.Option(help="Write to media that hold data, which is lost.")
    ] = False,
    speedup: Annotated[float, typer.Option(help="Play a trace so much faster.")] = 1.0,
    wrap: Annotated[
        bool, typer.Option(help="Take a trace's offsets modulo the size of the namespace.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is random.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run a workload on a drive in virtual time: IOPS, latencies, utilisation, WAF."""
    said = Console(stderr=True, highlight=False)
    filled = precondition if precondition is not None else (0.0 if media else FILLED)
    try:
        size_bytes = parse_size(size)
        setup = _Setup(media, filled, age_by, size_bytes, seed, overwrite)
        config = _without_staging(load_config(drive))
        if pattern and not fio and not trace:
            source = _pattern_source(
                pattern, read_share, size_bytes, depth, requests, seconds, seed
            )
        elif fio and not pattern and not trace:
            source = _fio_source(fio, seed)
        elif trace and not pattern and not fio:
            source = _Source(trace.name, [], [], trace, speedup, wrap)
        else:
            raise WorkloadRefused("say one of --pattern, --fio and --trace")
        found = _run(config, setup, source, said)
    except (DriveRefused, ValueError, OSError) as error:
        said.print(f"[red]refused:[/] {error}", soft_wrap=True)
        raise typer.Exit(_EXIT_REFUSED) from None
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        found.show(Console(highlight=False))


@dataclass(frozen=True, slots=True)
class _Setup:
    """The drive before the run."""

    media: Path | None
    filled_share: float
    age_by: float
    size_bytes: int
    seed: int
    overwrites: bool


@dataclass(frozen=True, slots=True)
class _Source:
    """What is run: groups of jobs one after the other, or a trace."""

    name: str
    groups: list[list[Job]]
    ignored: list[str]
    trace: Path | None = None
    speedup: float = 1.0
    wraps: bool = False

    @property
    def writes(self) -> bool:
        return self.trace is not None or any(
            job.read_share < 1 for group in self.groups for job in group
        )


@dataclass(frozen=True, slots=True)
class _Found:
    """All figures of one run."""

    drive: DriveConfig
    setup: _Setup
    source: _Source
    filled_bytes: int
    holding_data: float
    outcomes: list[Outcome]
    usage: report.Usage
    played: Played | None

    def as_json(self) -> dict[str, Any]:
        total = report.outcome_json(report.total_of(self.outcomes))
        del total["name"]
        trace = None
        if self.played:
            played = self.played
            trace = {
                "widened": played.widened,
                "wrapped": played.wrapped,
                "delayed": played.delayed,
            }
        return {
            "drive": self.drive.name,
            "workload": self.source.name,
            "seed": self.setup.seed,
            "filled_bytes": self.filled_bytes,
            "holding_data": self.holding_data,
            **total,
            **self.usage.as_json(),
            "jobs": [report.outcome_json(outcome) for outcome in self.outcomes],
            "ignored": self.source.ignored,
            "trace": trace,
        }

    def show(self, out: Console) -> None:
        total = report.total_of(self.outcomes)
        out.print(
            f"{self.source.name} on {self.drive.name}: {total.requests:,} requests in "
            f"{format_ns(total.ended_ns - total.started_ns)} of the drive's time, after writing "
            f"{format_size(self.filled_bytes)} of {format_size(self.drive.capacity_bytes)}",
            soft_wrap=True,
        )
        out.print(report.outcome_table(self.outcomes))
        for line in report.usage_lines(self.usage):
            out.print(line)
        if self.source.ignored:
            out.print(f"ignored, as they concern the host: {', '.join(self.source.ignored)}")
        if self.played:
            out.print(
                f"trace: {self.played.widened:,} requests widened to whole blocks, "
                f"{self.played.wrapped:,} wrapped, {self.played.delayed:,} out of order"
            )
        if total.reads.latencies.count and self.holding_data < 1:
            out.print(
                f"[yellow]{1 - self.holding_data:.1%} of the namespace asked for held no data: "
                "reads of it take no flash time[/]",
                soft_wrap=True,
            )


def _pattern_source(
    pattern: Pattern,
    read_share: float,
    size: int,
    depth: int,
    requests: int | None,
    seconds: float | None,
    seed: int,
) -> _Source:
    job = Job(
        name=pattern.value,
        read_share=_READ_SHARE.get(pattern, read_share),
        is_random=pattern in _RANDOM,
        size_bytes=size,
        depth=depth,
        requests=requests,
        duration_ns=None if seconds is None else int(seconds * NS_PER_S),
        seed=seed,
    )
    name = f"{pattern.value}, {format_size(size)}, depth {depth}"
    return _Source(name, [[job]], [])


def _fio_source(path: Path, seed: int) -> _Source:
    found = parse_fio(path.read_text(errors="replace"), str(path), seed)
    return _Source(path.name, found.groups, found.ignored)


def _run(config: DriveConfig, setup: _Setup, source: _Source, said: Console) -> _Found:
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="csd-workload-")))
        place = _Place(config, setup.media or scratch / "drive.csd", scratch, setup.media is None)
        filled_bytes = _prepare(place, setup, source, said)
        opened = stack.enter_context(place.open(TimeMode.VIRTUAL))
        groups = [[_within(job, filled_bytes) for job in group] for group in source.groups]
        holding = _holding(opened, groups)
        meter = report.Meter(opened)
        played, outcomes = None, []
        with _progress(said, "running") as tell:
            for group in groups:
                outcomes += run_jobs(opened, group, np.random.default_rng, tell)
            if source.trace:
                played = play_trace(opened, source.trace, source.speedup, source.wraps, tell)
                outcomes.append(played.outcome)
        usage = meter.read()
    return _Found(config, setup, source, filled_bytes, holding, outcomes, usage, played)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the drive lies; temporary ones keep no bytes."""

    config: DriveConfig
    media: Path
    scratch: Path
    is_hollow: bool

    @contextmanager
    def open(self, mode: TimeMode) -> Iterator[Drive]:
        hollow: Wrap | None = (lambda media, _: HollowMedia(media)) if self.is_hollow else None
        drive = Drive.open(
            self.config,
            self.media,
            clock=VirtualClock(),
            time_mode=mode,
            window_path=self.scratch / "window",
            wrap=hollow,
        )
        try:
            yield drive
        finally:
            drive.close()


def _prepare(place: _Place, setup: _Setup, source: _Source, said: Console) -> int:
    """Fills and ages the drive with time off, so that the run starts on an idle one."""
    with place.open(TimeMode.OFF) as drive:
        if drive.used_bytes and (source.writes or setup.filled_share) and not setup.overwrites:
            raise WorkloadRefused(
                f"{place.media} holds {format_size(drive.used_bytes)} of data that this would "
                "overwrite; say --overwrite if it may be lost"
            )
        with _progress(said, "writing first") as tell:
            filled_bytes = fill(drive, setup.filled_share, tell)
        if setup.age_by and filled_bytes:
            with _progress(said, "overwriting at random") as tell:
                age(
                    drive,
                    filled_bytes,
                    setup.age_by,
                    setup.size_bytes,
                    np.random.default_rng,
                    tell,
                )
    return filled_bytes


def _within(job: Job, filled_bytes: int) -> Job:
    """A job that names no region goes over what was filled."""
    if job.length_bytes or filled_bytes <= job.offset_bytes:
        return job
    return replace(job, length_bytes=filled_bytes - job.offset_bytes)


def _holding(drive: Drive, groups: list[list[Job]]) -> float:
    """The least part of any job's region that holds data; of all when there is no job."""
    block = drive.config.geometry.page_bytes // drive.config.geometry.sectors_per_page
    end = drive.capacity_bytes
    regions = [(job.offset_bytes, job.length_bytes) for group in groups for job in group]
    return min(
        drive.mapped_share(offset // block, (length or end - offset) // block)
        for offset, length in regions or [(0, end)]
        if offset + length <= end
    )


def _without_staging(config: DriveConfig) -> DriveConfig:
    """The drive with the least window and no unit cache: nothing is staged, no memory reserved."""
    dram = config.dram.model_copy(update={"window_bytes": MIB, "unit_cache_bytes": 0})
    return config.model_copy(update={"dram": dram})


@contextmanager
def _progress(said: Console, what: str) -> Iterator[Tell]:
    """Requests and the drive's time so far, on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=said, transient=True, disable=not said.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def tell(requests: int, passed_ns: int) -> None:
            text = f"{what}: {requests:,} requests, {format_ns(passed_ns)} of the drive's time"
            bar.update(task, description=text)

        yield tell
