"""What all peers run, under which limit, and what is noted of each."""

import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from csd_protocol.packed import Bits
from host_client.runtime.cgroup import Cgroup, Hierarchy

TIMEOUT_S = 900.0
PREPARATION_S = 1200.0
PROBE_BYTES, PROBE_PIECE_BYTES, PROBE_DEPTH = 1 << 30, 1 << 20, 4
_SAID_LINES = 3  # of a peer that failed


class Finish(BaseModel):
    """How a peer did; or why it did not. Sizes in bytes, times in seconds."""

    peer: str
    failure: str | None = None
    version: str = ""
    token_ids: list[int] = []
    prefill_s: float | None = None
    tokens_per_s: float | None = None
    token_s: list[float] = []
    read_bytes_per_token: float | None = None
    wait_s: float | None = None  # of ours, for the drive, in all
    limit_bytes: int
    peak_bytes: int | None = None
    drive_limit_bytes: int | None = None
    drive_peak_bytes: int | None = None
    disk_bytes_per_s: float | None = None  # that the disk gave just before and after, on average


@dataclass(frozen=True, slots=True)
class Course:
    """What all peers run."""

    checkpoint: Path
    gguf: Path
    bits: Bits  # of the GGUF's weights: 16, or 4 where that is what is raced
    budget_bytes: int  # for weights
    limit_bytes: int  # budget and allowance
    prompt: list[int]
    tokens: int
    python: Path  # of the environment with the peers
    node_modules: Path  # with node-llama-cpp

    def source(self, bits: Bits) -> Path:
        """What is packed at so many bits: at 4 the GGUF's levels, else the folder's values."""
        return self.gguf if bits == 4 else self.checkpoint


Runner = Callable[[Course], Finish]


class PeerFailed(Exception):
    """A peer that ended early, with what it said last."""


@contextmanager
def limited(size_bytes: int, name: str) -> Iterator[Cgroup]:
    """A control group with this limit, caches cold."""
    with Cgroup.made(Hierarchy.find(), name) as group:
        group.limit(size_bytes)
        drop_caches()
        yield group


def drop_caches() -> None:
    """What is in the page cache is read from the disk again. Needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def disk_rate(file: Path) -> float:
    """Bytes a second that large direct reads of a file get from its disk now."""
    handle = os.open(file, os.O_RDONLY | os.O_DIRECT)
    pieces = min(PROBE_BYTES, file.stat().st_size) // PROBE_PIECE_BYTES

    def read(first: int) -> None:
        memory = mmap.mmap(-1, PROBE_PIECE_BYTES)
        for piece in range(first, pieces, PROBE_DEPTH):
            os.preadv(handle, [memory], piece * PROBE_PIECE_BYTES)

    started = time.perf_counter()
    with ThreadPoolExecutor(PROBE_DEPTH) as threads:
        list(threads.map(read, range(PROBE_DEPTH)))
    seconds = time.perf_counter() - started
    os.close(handle)
    return pieces * PROBE_PIECE_BYTES / seconds


def said(words: list[str], timeout_s: float, group: Cgroup | None = None) -> str:
    """What a process printed. Raises PeerFailed."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise PeerFailed(f"not done within {timeout_s:g} s") from None
    if group and group.kills:
        raise PeerFailed("ended by the kernel at its memory limit")
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-_SAID_LINES:])
        raise PeerFailed(f"exit status {done.returncode}: {last}")
    return done.stdout
