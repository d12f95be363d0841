"""The error log and the stage log: the newest entries, and totals of everything."""

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from csd_device.firmware.commands import StagedSite, StageResult, Timing
from csd_protocol.status import Status

ERROR_ENTRIES_MAX = 64
STAGE_ENTRIES_MAX = 256
_SITE_FIELDS = (
    "site",
    "units",
    "units_from_dram",
    "nand_page_reads",
    "length_bytes",
    "units_from_copies",
)


@dataclass(frozen=True, slots=True)
class ErrorEntry:
    """One command that failed."""

    error_count: int  # which of all errors since the drive was opened, from 1
    queue: int  # 0: no queue's, the drive's own
    cid: int
    command: str
    sct: int
    sc: int
    status: str
    detail: str
    at_ns: int


class ErrorLog:
    """The newest failed commands, newest first."""

    def __init__(self) -> None:
        self.error_count = 0
        self._entries: deque[ErrorEntry] = deque(maxlen=ERROR_ENTRIES_MAX)

    def add(
        self, status: Status, detail: str, *, queue: int, cid: int, command: str, at_ns: int
    ) -> None:
        self.error_count += 1
        self._entries.appendleft(
            ErrorEntry(
                error_count=self.error_count,
                queue=queue,
                cid=cid,
                command=command,
                sct=status.sct,
                sc=status.sc,
                status=status.value.title,
                detail=detail,
                at_ns=at_ns,
            )
        )

    def report(self) -> dict[str, Any]:
        """A JSON object: `error_count` and `entries`, newest first."""
        return {
            "error_count": self.error_count,
            "entries": [asdict(entry) for entry in self._entries],
        }


@dataclass(slots=True)
class StageTotals:
    """Sums over all staging commands."""

    commands: int = 0
    sites: int = 0
    units_staged: int = 0
    units_from_dram: int = 0
    units_predicted: int = 0
    staged_bytes: int = 0
    nand_page_reads: int = 0
    units_from_copies: int = 0  # read from another copy than the first
    queue_ns: int = 0
    program_ns: int = 0
    nand_ns: int = 0
    dram_ns: int = 0
    link_ns: int = 0


@dataclass(frozen=True, slots=True)
class _StageEntry:
    host: str
    model: int
    token: int | None  # None: STAGE has none
    sites: tuple[tuple[int, ...], ...]  # `_SITE_FIELDS` of each; no arrays, they would add up
    timing: Timing


class StageLog:
    """The newest staging commands, newest first, and the totals."""

    def __init__(self) -> None:
        self.totals = StageTotals()
        self._entries: deque[_StageEntry] = deque(maxlen=STAGE_ENTRIES_MAX)

    def add(
        self, host: str, model: int, token: int | None, result: StageResult, timing: Timing
    ) -> None:
        sites = tuple(_site_figures(site) for site in result.sites)
        self._entries.appendleft(_StageEntry(host, model, token, sites, timing))
        totals = self.totals
        totals.commands += 1
        for site in result.sites:
            totals.sites += 1
            totals.units_staged += site.unit_count
            totals.units_from_dram += site.units_from_dram
            totals.units_predicted += site.predicted.size
            totals.staged_bytes += site.length_bytes
            totals.nand_page_reads += site.nand_page_reads
            totals.units_from_copies += site.units_from_copies
        totals.queue_ns += timing.queue_ns
        totals.program_ns += timing.program_ns
        totals.nand_ns += timing.nand_ns
        totals.dram_ns += timing.dram_ns
        totals.link_ns += timing.link_ns

    def report(self) -> dict[str, Any]:
        """A JSON object: `totals` and `entries`, newest first."""
        return {
            "totals": asdict(self.totals),
            "entries": [_describe(entry) for entry in self._entries],
        }


def _site_figures(site: StagedSite) -> tuple[int, ...]:
    return (
        site.site,
        site.unit_count,
        site.units_from_dram,
        site.nand_page_reads,
        site.length_bytes,
        site.units_from_copies,
    )


def _describe(entry: _StageEntry) -> dict[str, Any]:
    return {
        "host": entry.host,
        "model": entry.model,
        "token": entry.token,
        "sites": [dict(zip(_SITE_FIELDS, figures, strict=True)) for figures in entry.sites],
        "timing": asdict(entry.timing),
    }
