"""The budget as a limit that the kernel keeps: what it comes to, and what was measured under it."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel

from host_client.runtime.cgroup import Cgroup, Hierarchy

ALLOWANCE_BYTES = 448 << 20
"""Beside the budget, for what is no part of the model: interpreter, torch, transformers, gRPC,
compiled kernels, the tokenizer (docs/BENCHMARKS.md has what they take). At least: see
`allowed`."""

_BEHIND_START_BYTES = 152 << 20  # of it, for what comes with the weights: activations and the like
_BYTES_PER_TABLE_BYTE = 512  # page tables: eight bytes for each page of 4 KiB
_PROMPT_BYTES = 32 << 20  # of what comes with the weights: activations of a prompt
_CHUNK_TOKENS_MAX = 512  # 1,024 were no faster, and left more behind them
_LIVE_TENSORS = 10  # of a prompt, float32 and as wide as its hidden state; 9.6 were measured


def allowed(start_bytes: int, budget_bytes: int) -> int:
    """The allowance of a process that keeps so much before any weights, with page tables.

    What is installed decides the former: a torch for GPUs alone takes a third more than one for the
    CPU.
    """
    tables_bytes = budget_bytes // _BYTES_PER_TABLE_BYTE
    return max(ALLOWANCE_BYTES, start_bytes + _BEHIND_START_BYTES) + tables_bytes


def prompt_chunk_tokens(hidden: int) -> int:
    """How many tokens of a prompt go through a layer at once, hidden states of this width."""
    return max(1, min(_CHUNK_TOKENS_MAX, _PROMPT_BYTES // (_LIVE_TENSORS * 4 * hidden)))


class EnforcedReport(BaseModel):
    """What the kernel kept and measured. Sizes in bytes."""

    limit_bytes: int
    allowance_bytes: int
    start_bytes: int  # in use before any weights were loaded, without page cache
    peak_bytes: int


class MemoryLimit:
    """On the control group that this process was started in (`csd generate --enforce`)."""

    def __init__(self, group: Cgroup, budget_bytes: int) -> None:
        self._group = group
        self._start_bytes = group.kept_bytes
        self._allowance_bytes = allowed(self._start_bytes, budget_bytes)
        self._limit_bytes = budget_bytes + self._allowance_bytes

    @classmethod
    def begin(cls, budget_bytes: int) -> Self:
        """From now on. Raises NoCgroup."""
        group = Cgroup.entered(Hierarchy.find())
        limit = cls(group, budget_bytes)
        group.limit(limit._limit_bytes)
        return limit

    def report(self) -> EnforcedReport:
        return EnforcedReport(
            limit_bytes=self._limit_bytes,
            allowance_bytes=self._allowance_bytes,
            start_bytes=self._start_bytes,
            peak_bytes=self._group.peak_bytes,
        )


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """What the kernel could give to processes now, without swapping (MemAvailable)."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{meminfo} has no MemAvailable line")
