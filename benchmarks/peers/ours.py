"""`csd generate --enforce`, the drive's daemon limited to the size of the drive's DRAM."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.peers.checkpoint import prompt_text
from benchmarks.peers.course import (
    PREPARATION_S,
    TIMEOUT_S,
    Course,
    Finish,
    PeerFailed,
    drop_caches,
    limited,
    said,
)
from csd_device.config import load_config
from csd_protocol.packed import Bits
from csd_protocol.units import MIB
from host_client.cli.console import CSD
from host_client.driver import Drive
from host_client.model.catalog import list_models
from host_client.runtime.cgroup import Cgroup

DRIVE_FILE = Path(__file__).with_name("drive.toml")
_NO_CACHE = "unit_cache_bytes = 0"
SHADOW_BITS = "2"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the model on a drive."""

    name: str
    version: str  # what it is, in the table
    bits: Bits = 16
    quality: str = "exact"
    unit_cache_bytes: int = 0  # of the drive's DRAM
    chooses: bool = False  # a program on the drive is built

    def media(self, course: Course) -> Path:
        """The folder of its drive; ways that pack alike share it."""
        kind = f"{self.bits}-bits" + ("-program" if self.chooses else "")
        return course.checkpoint.with_suffix(f".{kind}.csd")

    def run(self, course: Course) -> Finish:
        """Packs the model unless that was done, unmeasured; then generates."""
        source = str(course.source(self.bits))
        media = self.media(course)
        self._prepare(media, source, course)
        with _daemon(media, self.unit_cache_bytes, is_limited=True) as (address, group):
            words = _csd(
                *("generate", source, "--drive", address, "--time", "off", "--json", "--enforce"),
                *(*self._prompt(course), "--quality", self.quality),
                *("--max-new-tokens", str(course.tokens), "--dram", str(course.budget_bytes)),
            )
            drop_caches()
            found: dict[str, Any] = json.loads(said(words, TIMEOUT_S))
            config = load_config(DRIVE_FILE)
            return Finish(
                peer=self.name,
                version=self.version,
                token_ids=found["token_ids"],
                prefill_s=found["prefill_s"],
                tokens_per_s=found["tokens_per_s"],
                read_bytes_per_token=found["nand_page_reads_per_token"]
                * config.geometry.page_bytes,
                wait_s=found["host_wait_s"],
                limit_bytes=found["enforced"]["limit_bytes"],
                peak_bytes=found["enforced"]["peak_bytes"],
                drive_limit_bytes=config.dram.total_bytes,
                drive_peak_bytes=group.peak_bytes if group else None,
            )

    def _prepare(self, media: Path, source: str, course: Course) -> None:
        """Packs, and compiles what is compiled once: under no limit, since it happens once."""
        with _daemon(media, 0, is_limited=False) as (address, _):
            at = ("--drive", address)
            if not _is_packed(address, Path(source)):
                bits = ("--bits", str(self.bits))
                said(_csd("pack", source, "--no-calibrate", *bits, *at), PREPARATION_S)
                if self.chooses:
                    build = ("predictor", "build", "shadow", source, "--bits", SHADOW_BITS)
                    said(_csd(*build, *at), PREPARATION_S)
            words = (*self._prompt(course), "--max-new-tokens", "2", "--quality", self.quality)
            dram = ("--dram", str(course.budget_bytes))
            said(_csd("generate", source, *at, *words, *dram, "--json"), PREPARATION_S)

    def _prompt(self, course: Course) -> tuple[str, ...]:
        if self.bits == 4:  # the GGUF's tokenizer is no more than llama.cpp needs
            return ("--prompt-tokens", str(len(course.prompt)))
        return ("--prompt", prompt_text(course.prompt), "--raw")


WAYS = (
    Way("flash-csd", "exact"),
    Way("flash-csd, 12 bits", "exact, 12 bits without loss", bits=12),
    Way(
        "flash-csd, 12 bits, drive DRAM",
        "the same, units kept in the drive's DRAM",
        bits=12,
        unit_cache_bytes=448 * MIB,
    ),
    Way(
        "flash-csd, 0.1+correct",
        "a tenth of the neurons, the drive adds the rest",
        bits=12,
        quality="0.1+correct",
        unit_cache_bytes=384 * MIB,
        chooses=True,
    ),
)
FOUR_BITS = Way("flash-csd, 4 bits", "exact, the file's own levels", bits=4)


def _csd(*arguments: str) -> list[str]:
    return [sys.executable, *CSD, *arguments]


def _is_packed(address: str, source: Path) -> bool:
    name = source.name.removesuffix(".gguf")
    with Drive.connect(address) as drive:
        return name in [entry.name for entry in list_models(drive)]


@contextmanager
def _daemon(
    media: Path, unit_cache_bytes: int, is_limited: bool
) -> Iterator[tuple[str, Cgroup | None]]:
    """The drive's daemon, in a group of its own where it is limited, and where it listens."""
    with TemporaryDirectory(prefix="csd-peers-") as folder:
        file, address = Path(folder) / "drive.toml", f"unix:{folder}/csd.sock"
        text = DRIVE_FILE.read_text()
        assert text.count(_NO_CACHE) == 1
        file.write_text(text.replace(_NO_CACHE, f"unit_cache_bytes = {unit_cache_bytes}"))
        words = [
            *(sys.executable, "-m", "csd_device.service", "serve", "--drive", str(file)),
            *("--media", str(media), "--listen", address, "--stop-with-stdin"),
        ]
        if not is_limited:
            with _started(words):
                yield address, None
            return
        with (
            limited(load_config(DRIVE_FILE).dram.total_bytes, "-drive") as group,
            _started(group.command(words)),
        ):
            yield address, group


@contextmanager
def _started(words: list[str]) -> Iterator[None]:
    """A daemon that listens."""
    daemon = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert daemon.stdout is not None
    try:
        if not daemon.stdout.readline():
            raise PeerFailed("the drive's daemon did not start")
        yield
    finally:
        daemon.communicate()
