"""Reading the window: our reader over fio's io_uring engine on the same file, same sizes and depth.

Rounds of all alternate, so that what else the machine does falls on all; medians are compared. fio
reads a tmpfs file inside its submitting call, on one core; with force_async in kernel workers, as
our reader does. We are held to the faster of the two. On a machine that is busy with other work the
figures flatter whoever has more threads: judge them on an idle one.
Where fio is not installed the reference is preadv in one thread.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from statistics import median

from benchmarks.ratio import Ratio
from benchmarks.stopwatch import seconds_of
from csd_protocol.units import MIB
from host_client.io import Buffer, Extent, Reader, Ticket, open_reader

FLOOR = 0.9
DEPTH = 4  # reads under way at once, on both sides
READ_BYTES = (MIB, 4 * MIB, 16 * MIB)
SHARED_MEMORY = Path("/dev/shm")


def run(tiny: bool) -> list[Ratio]:
    file_bytes, rounds = (16 * MIB, 1) if tiny else (256 * MIB, 5)
    folder = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.NamedTemporaryFile(prefix="csd-bench-", dir=folder) as file:
        path = Path(file.name)
        for _ in range(file_bytes // MIB):
            file.write(os.urandom(MIB))
        file.flush()
        with open_reader(path) as reader:
            return [_compare(reader, path, size, file_bytes, rounds) for size in READ_BYTES]


def _compare(reader: Reader, path: Path, size: int, file_bytes: int, rounds: int) -> Ratio:
    ours, references = _ours(reader, size, file_bytes), _references(path, size, file_bytes)
    ours()  # the first touch of buffers does not count
    rates = [(ours(), *(measure() for measure in references.values())) for _ in range(rounds)]
    ours_median, *medians = (median(column) for column in zip(*rates, strict=True))
    fastest = max(zip(medians, references, strict=True))
    return Ratio(
        name=f"window reads of {size // MIB} MiB",
        ours=ours_median,
        reference=fastest[0],
        unit="GB/s",
        floor=FLOOR,
        against=fastest[1],
        notes=f"{reader.name}, {DEPTH} reads under way, tmpfs",
    )


def _references(path: Path, size: int, file_bytes: int) -> dict[str, Callable[[], float]]:
    """By name; the fastest is what we are held to."""
    fio = shutil.which("fio")
    if fio is None:
        return {"preadv, one thread (no fio here)": _preadv(path, size, file_bytes)}
    return {
        "fio, io_uring engine": _fio(fio, path, size, file_bytes),
        "fio, io_uring engine, force_async": _fio(fio, path, size, file_bytes, "--force_async=1"),
    }


def _ours(reader: Reader, size: int, file_bytes: int) -> Callable[[], float]:
    buffer = Buffer(DEPTH * size)
    count = file_bytes // size
    passes = 4  # over the file: long enough for the clock, short enough for many rounds

    def read_all() -> None:
        numbers, slots = islice(cycle(range(count)), passes * count), cycle(range(DEPTH))
        under_way: deque[Ticket] = deque()
        for number, slot in zip(numbers, slots, strict=False):
            if len(under_way) == DEPTH:
                reader.wait(under_way.popleft())
            under_way.append(reader.submit([Extent(number * size, size, buffer, slot * size)]))
        for ticket in under_way:
            reader.wait(ticket)

    return lambda: passes * count * size / seconds_of(read_all) / 1e9


def _fio(fio: str, path: Path, size: int, file_bytes: int, *options: str) -> Callable[[], float]:
    command = [
        *(fio, "--name=window", f"--filename={path}", "--readonly", "--rw=read"),
        *("--ioengine=io_uring", f"--iodepth={DEPTH}", f"--bs={size}", f"--size={file_bytes}"),
        *("--time_based", "--ramp_time=200ms", "--runtime=400ms"),
        *("--output-format=json", "--invalidate=0", *options),
    ]

    def measure() -> float:
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        job = json.loads(said[said.index("{") :])["jobs"][0]["read"]
        return float(job["bw_bytes"]) / 1e9

    return measure


def _preadv(path: Path, size: int, file_bytes: int) -> Callable[[], float]:
    buffer = Buffer(size)

    def read_all() -> None:
        with path.open("rb", buffering=0) as file:
            for offset in range(0, file_bytes, size):
                assert os.preadv(file.fileno(), [buffer.array.data], offset) == size

    return lambda: file_bytes / seconds_of(read_all) / 1e9
