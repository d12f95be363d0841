"""Traces of MSR Cambridge: parsing, arrival times, and what is refused by line."""

import gzip
from pathlib import Path

import pytest

from csd_device.workload.msr_trace import play_trace
from csd_device.workload.patterns import WorkloadRefused
from tests.unit.workload.conftest import Opened, quiet

START = 128_166_372_003_061_629  # ticks of 100 ns


def line(ticks: int, kind: str, offset: int, size: int, disk: int = 0) -> str:
    return f"{START + ticks},usr,{disk},{kind},{offset},{size},4000\n"


def test_requests_arrive_when_they_did(filled: Opened, tmp_path: Path) -> None:
    drive, _ = filled("tiny", 0.5)
    path = tmp_path / "trace.csv.gz"
    lines = [
        line(0, "Read", 0, 4096),
        line(10_000, "Write", 8192, 4096),  # 1 ms later
        line(20_000, "Read", 512, 4096),  # two blocks
        line(19_000, "Read", 1 << 20, 3 << 20),  # stamped earlier, three commands
        line(40_000, "write", 1 << 41, 8192),  # beyond the namespace
    ]
    with gzip.open(path, "wt") as file:
        file.writelines(lines)
    played = play_trace(drive, path, 2.0, True, quiet)
    assert (played.widened, played.delayed, played.wrapped) == (1, 1, 1)
    reads, writes = played.outcome.reads, played.outcome.writes
    assert (reads.latencies.count, writes.latencies.count) == (3, 2)
    assert reads.bytes == 4096 + 8192 + (3 << 20)
    assert writes.bytes == 4096 + 8192
    assert reads.latencies.percentile_ns(1) < 40_000 < reads.latencies.max_ns
    assert 2_000_000 < played.outcome.ended_ns < 2_300_000


@pytest.mark.parametrize(
    "planted, message",
    [
        ("1,usr,0,Read,0\n", "trace.csv:2: 5 fields; a record has 7"),
        (line(5, "Trim", 0, 4096), "trace.csv:2: type 'Trim'"),
        ("x,usr,0,Read,0,4096,1\n", "trace.csv:2: invalid literal"),
        (line(5, "Read", 0, 0), "trace.csv:2: 0 bytes from 0"),
        (line(5, "Read", -512, 512), "trace.csv:2: 512 bytes from -512"),
        (line(5, "Read", 0, 4096, disk=1), "trace.csv:2: disk usr.1, and usr.0 before"),
        (line(5, "Read", 1 << 40, 4096), "trace.csv:2: 4096 bytes from 1099511627776 lie beyond"),
    ],
)
def test_bad_lines_are_refused_by_number(
    filled: Opened, tmp_path: Path, planted: str, message: str
) -> None:
    drive, _ = filled("tiny", 0)
    path = tmp_path / "trace.csv"
    path.write_text(line(0, "Read", 0, 4096) + planted)
    with pytest.raises(WorkloadRefused, match=message):
        play_trace(drive, path, 1.0, False, quiet)


def test_an_empty_trace_and_no_speed_are_refused(filled: Opened, tmp_path: Path) -> None:
    drive, _ = filled("tiny", 0)
    path = tmp_path / "trace.csv"
    path.write_text("\n")
    for speedup, message in ((1.0, "no request in it"), (0.0, "a speedup of 0.0")):
        with pytest.raises(WorkloadRefused, match=message):
            play_trace(drive, path, speedup, False, quiet)
