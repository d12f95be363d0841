"""The error log, which lasts, and the stage log: the newest entries, and totals of everything."""

from collections import deque
from dataclasses import asdict, dataclass, fields
from typing import Any

from csd_device.firmware.commands import StagedSite, StageResult, Timing
from csd_device.firmware.log_folder import LogFolder
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
    "to_dram",
    "units_no_room",
    "units_lost",
)


@dataclass(frozen=True, slots=True)
class ErrorEntry:
    """One command that failed."""

    error_count: int  # which of all errors of the drive's life, from 1
    queue: int  # 0: no queue's, the drive's own
    cid: int
    command: str
    sct: int
    sc: int
    status: str
    detail: str
    at_ns: int  # drive clock of that power cycle
    power_cycle: int


class ErrorLog:
    """The newest failed commands, newest first; each is written to the folder as it happens."""

    def __init__(self, folder: LogFolder, error_count: int) -> None:
        """`error_count`: of the drive's life, as it was saved."""
        self._folder = folder
        self.error_count = error_count
        self._entries: deque[ErrorEntry] = deque(maxlen=ERROR_ENTRIES_MAX)
        for record in folder.records:
            if record.get("log") == "error":
                self._restore(record)

    def add(
        self,
        status: Status,
        detail: str,
        *,
        queue: int,
        cid: int,
        command: str,
        at_ns: int,
        power_cycle: int,
    ) -> None:
        self.error_count += 1
        entry = ErrorEntry(
            error_count=self.error_count,
            queue=queue,
            cid=cid,
            command=command,
            sct=status.sct,
            sc=status.sc,
            status=status.value.title,
            detail=detail,
            at_ns=at_ns,
            power_cycle=power_cycle,
        )
        self._entries.appendleft(entry)
        self._folder.append({"log": "error", **asdict(entry)})

    def report(self) -> dict[str, Any]:
        """A JSON object: `error_count` and `entries`, newest first."""
        return {
            "error_count": self.error_count,
            "entries": [asdict(entry) for entry in self._entries],
        }

    def records(self) -> list[dict[str, Any]]:
        """What the folder should keep, oldest first."""
        return [{"log": "error", **asdict(entry)} for entry in reversed(self._entries)]

    def _restore(self, record: dict[str, Any]) -> None:
        """Takes over one that was written before; another version's is passed over."""
        names = {field.name for field in fields(ErrorEntry)}
        if set(record) != names | {"log"} or not isinstance(record["error_count"], int):
            return
        self._entries.appendleft(ErrorEntry(**{name: record[name] for name in names}))
        self.error_count = max(self.error_count, record["error_count"])


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
    units_to_dram: int = 0  # by targets to DRAM, from NAND; those are no staged units
    units_no_room: int = 0
    units_lost: int = 0  # not to be read, of targets to DRAM
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
            if site.to_dram:
                totals.units_to_dram += site.unit_count - site.units_from_dram
                totals.units_no_room += site.units_no_room
                totals.units_lost += site.units_lost
            else:
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
        site.to_dram,
        site.units_no_room,
        site.units_lost,
    )


def _describe(entry: _StageEntry) -> dict[str, Any]:
    return {
        "host": entry.host,
        "model": entry.model,
        "token": entry.token,
        "sites": [dict(zip(_SITE_FIELDS, figures, strict=True)) for figures in entry.sites],
        "timing": asdict(entry.timing),
    }
