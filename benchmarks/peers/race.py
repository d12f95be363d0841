"""One peer at a time: caches cold, in a control group with the limit that all of them get."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import BaseModel

from benchmarks.peers.checkpoint import prompt_text
from csd_device.config import load_config
from host_client.driver import Drive
from host_client.model.catalog import list_models
from host_client.runtime.cgroup import Cgroup, Hierarchy

HERE = Path(__file__).parent
DRIVE_FILE = HERE / "drive.toml"
TIMEOUT_S = 900.0
_SAID_LINES = 3  # of a peer that failed
_PREPARATION_S = 600.0


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
    limit_bytes: int
    peak_bytes: int | None = None
    drive_limit_bytes: int | None = None
    drive_peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Course:
    """What all peers run."""

    checkpoint: Path
    gguf: Path
    budget_bytes: int  # for weights
    limit_bytes: int  # budget and allowance
    prompt: list[int]
    tokens: int
    python: Path  # of the environment with the peers
    node_modules: Path  # with node-llama-cpp


Runner = Callable[[Course], Finish]


class PeerFailed(Exception):
    """A peer that ended early, with what it said last."""


def driven(name: str, script: str, of: Callable[[Course], Path], splits: bool = False) -> Runner:
    """A peer behind a driver. `splits`: it lays files of its own down first, unmeasured."""

    def run(course: Course) -> Finish:
        os.environ["PEERS_NODE_MODULES"] = str(course.node_modules)
        arguments = [str(of(course)), str(course.budget_bytes)]
        if splits:
            _said(_words(course, script, arguments, 0), _PREPARATION_S)
        words = _words(course, script, arguments, course.tokens)
        with limited(course.limit_bytes, "-peer") as group:
            said = json.loads(_said(group.command(words), TIMEOUT_S, group).splitlines()[-1])
            seconds = said["token_s"]
            return Finish(
                peer=name,
                limit_bytes=course.limit_bytes,
                peak_bytes=group.peak_bytes,
                tokens_per_s=len(seconds) / sum(seconds),
                **said,
            )

    return run


def _words(course: Course, script: str, arguments: list[str], tokens: int) -> list[str]:
    """The command line of a driver. Raises PeerFailed where it cannot run."""
    ids = json.dumps(course.prompt)
    interpreter: Path | str = course.python
    if script.endswith(".mjs"):
        if not (course.node_modules / "node-llama-cpp").is_dir():
            raise PeerFailed(f"node-llama-cpp is not installed in {course.node_modules}")
        interpreter = "node"
    return [str(interpreter), str(HERE / script), *arguments, str(tokens), ids]


def flash_csd(course: Course) -> Finish:
    """Ours: `csd generate --enforce`, the drive's daemon limited to the size of its DRAM."""
    media = course.checkpoint.with_suffix(".csd")
    with _daemon(media) as (address, _):
        name = course.checkpoint.name
        if name not in _packed(address):
            pack = ["pack", str(course.checkpoint), "--no-calibrate", "--drive", address]
            _said(_csd(*pack), _PREPARATION_S)
    with _daemon(media) as (address, group):
        words = _csd(
            *("generate", str(course.checkpoint), "--drive", address, "--time", "off"),
            *("--prompt", prompt_text(course.prompt), "--raw", "--json", "--enforce"),
            *("--max-new-tokens", str(course.tokens), "--dram", str(course.budget_bytes)),
        )
        drop_caches()
        found: dict[str, Any] = json.loads(_said(words, TIMEOUT_S))
        return Finish(
            peer="flash-csd",
            version="exact",
            token_ids=found["token_ids"],
            prefill_s=found["prefill_s"],
            tokens_per_s=found["tokens_per_s"],
            read_bytes_per_token=found["staged_bytes_per_token"],
            limit_bytes=found["enforced"]["limit_bytes"],
            peak_bytes=found["enforced"]["peak_bytes"],
            drive_limit_bytes=load_config(DRIVE_FILE).dram.total_bytes,
            drive_peak_bytes=group.peak_bytes,
        )


def _csd(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from host_client.cli.app import main; main()", *arguments]


def _packed(address: str) -> list[str]:
    with Drive.connect(address) as drive:
        return [entry.name for entry in list_models(drive)]


@contextmanager
def _daemon(media: Path) -> Iterator[tuple[str, Cgroup]]:
    """The drive's daemon in a group of its own, and where it listens."""
    with (
        TemporaryDirectory(prefix="csd-peers-") as folder,
        limited(load_config(DRIVE_FILE).dram.total_bytes, "-drive") as group,
    ):
        address = f"unix:{folder}/csd.sock"
        words = [
            *(sys.executable, "-m", "csd_device.service", "serve", "--drive", str(DRIVE_FILE)),
            *("--media", str(media), "--listen", address, "--stop-with-stdin"),
        ]
        daemon = subprocess.Popen(
            group.command(words), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert daemon.stdout is not None
        if not daemon.stdout.readline():
            raise PeerFailed("the drive's daemon did not start")
        try:
            yield address, group
        finally:
            daemon.communicate()


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


def _said(words: list[str], timeout_s: float, group: Cgroup | None = None) -> str:
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


PEERS: dict[str, Runner] = {
    "flash-csd": flash_csd,
    "accelerate": driven("accelerate", "accelerate_offload.py", lambda it: it.checkpoint),
    "airllm": driven("airllm", "airllm_layers.py", lambda it: it.checkpoint, splits=True),
    "llama.cpp": driven("llama.cpp", "llama_cpp_mmap.mjs", lambda it: it.gguf),
}


def race(course: Course, names: list[str]) -> Iterator[Finish]:
    """Each peer's result as it is there."""
    for name in names:
        try:
            yield PEERS[name](course)
        except PeerFailed as error:
            yield Finish(peer=name, failure=str(error), limit_bytes=course.limit_bytes)
