"""A drive, the dictionary it is held against, the checkers that watch it, and its power.

A test or a simulation chooses what happens; the world does it to both and compares. Power may go
within any operation on media or files (`lose_power_within`); the drive is then opened again, which
may be cut as well, and what it holds has to be allowed.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest
from acknowledged import Acknowledged, Change
from checker import Broken, Checker, Tables, Watching
from cut_files import plug_files
from freed_checker import FreedChecker
from inverse_checker import InverseChecker
from order_checker import OrderChecker
from program_checker import ProgramChecker
from simulated_drive import SimulatedFtl, Subject, Wrap
from valid_checker import ValidChecker
from watched_media import WatchedMedia

from csd_device.config import SECTOR_BYTES, DriveConfig, load_config
from csd_device.errors import CommandError
from csd_device.ftl import Ftl
from csd_device.nand.faults.power_loss import PowerCut, PowerLoss, PowerSupply
from csd_device.nand.media import Media
from csd_device.nand.superblocks import Superblocks
from csd_protocol.status import Status

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # so that a sync costs nothing
CHECKERS: tuple[type[Watching], ...] = (
    InverseChecker,
    ProgramChecker,
    OrderChecker,
    ValidChecker,
    FreedChecker,
)
COPY_PIECE = 256  # sectors of a copy that are written at once; each is all or nothing
REFUSALS = {Status.CAPACITY_EXCEEDED, Status.WRITE_PROTECTED}  # nothing changed
_REPORTING = ("write", "deallocate", "write_zeroes", "deallocate_all", "flush", "work_idle")
_ZERO = np.uint64(0)
Around = Callable[[Media], Media]


def _clean(media: Media) -> Media:
    return media


def small_drive() -> DriveConfig:
    """24 superblocks of 8 pages of 4 sectors: 3 MiB of NAND, 2 MiB for the host, 3 spares."""
    drive = load_config("tiny").model_dump()
    drive["geometry"] |= {
        "channels": 2,
        "dies_per_channel": 1,
        "planes_per_die": 2,
        "blocks_per_plane": 24,
        "pages_per_block": 2,
    }
    drive["dram"] |= {"window_bytes": 1 << 16, "unit_cache_bytes": 1 << 16}
    drive["queues"] |= {"mdts_bytes": 256 << 10}
    drive["ftl"] |= {"over_provisioning": 0.33}
    return DriveConfig.model_validate(drive)


class World:
    """A context manager. Sectors above `sectors` are never used; None: all are."""

    def __init__(
        self,
        rng: np.random.Generator,
        make: Callable[[Path, DriveConfig, Wrap], Subject] = SimulatedFtl,
        config: DriveConfig | None = None,
        sectors: int | None = None,
        checkers: Sequence[type[Watching]] = CHECKERS,
        faults: Around = _clean,
        above: Around = _clean,
    ) -> None:
        """`faults` are around media on a power supply; `above` is what a wrong FTL would do."""
        self.config = config or small_drive()
        self.sectors = sectors or self.config.capacity_sectors
        self.expected = Acknowledged(self.sectors)
        self.checkers: list[Checker] = [kind(self.config.geometry) for kind in checkers]
        self.power_losses = self.stamp = 0
        self.refusals: list[Status] = []
        self._rng = rng
        self._make = make
        self._faults, self._above = faults, above
        self._tables: Tables | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="csd-world-", dir=MEMORY))
        self._patch = pytest.MonkeyPatch()
        self._open()

    # ---- what a host does --------------------------------------------------------------------

    def write(self, lpn: int, count: int, fua: bool = False) -> None:
        self.stamp += 1
        values = np.arange(lpn, lpn + count, dtype=np.uint64) | np.uint64(self.stamp << 32)
        data = np.repeat(values, SECTOR_BYTES // 8).tobytes()
        change = self.expected.propose(lpn, values)
        self._change([change], lambda: self.subject.write(lpn, data, fua), is_durable=fua)

    def deallocate(self, lpn: int, count: int) -> None:
        change = self.expected.propose(lpn, np.full(count, _ZERO), is_whole=False)
        self._change([change], lambda: self.subject.deallocate(lpn, count))

    def write_zeroes(self, lpn: int, count: int) -> None:
        change = self.expected.propose(lpn, np.full(count, _ZERO), is_whole=False)
        self._change([change], lambda: self.subject.write_zeroes(lpn, count))

    def copy(self, target: int, source: int, count: int) -> None:
        """Source and target must not overlap."""
        values = self.expected.now[source : source + count].copy()
        changes = [
            self.expected.propose(target + start, values[start : start + COPY_PIECE])
            for start in range(0, count, COPY_PIECE)
        ]
        self._change(changes, lambda: self.subject.copy(target, source, count))

    def compare(self, lpn: int, count: int, is_equal: bool) -> None:
        values = self.expected.now[lpn : lpn + count].copy()
        values[-1] ^= np.uint64(not is_equal)
        data = np.repeat(values, SECTOR_BYTES // 8).tobytes()
        answer: list[bool] = []
        if self._perform(lambda: answer.append(self.subject.compare(lpn, data))):
            _require(answer == [is_equal], f"compare of {count} sectors at {lpn} says {answer[0]}")

    def read(self, lpn: int, count: int) -> None:
        found: list[Any] = []
        if self._perform(lambda: found.append(self._values(lpn, count))):
            self.expected.check_reads(lpn, found[0])

    def read_all(self) -> None:
        self.read(0, self.sectors)

    def flush(self) -> None:
        if self._perform(lambda: self.subject.flush()):
            self.expected.flushed()

    def idle(self, sectors: int) -> None:
        """The drive has time to move so many sectors."""
        self._perform(lambda: self.subject.idle(sectors))

    # ---- what becomes of the drive -----------------------------------------------------------

    def restart(self) -> None:
        if self._perform(lambda: self.subject.close()):
            self.expected.flushed()
            self._unplug()
            self._open()
            self.read_all()

    def lose_power(self) -> None:
        """Between two commands."""
        try:
            self.supply.go_off()
        except PowerCut:
            self._power_went()

    def lose_power_within(self, operations: int) -> None:
        """The n-th change of media or files from now is cut, whatever command it belongs to."""
        self.supply.go_off_at(operations)

    def close(self) -> None:
        self._unplug()
        shutil.rmtree(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ---- how it is done ----------------------------------------------------------------------

    def _change(
        self, changes: list[Change], act: Callable[[], None], is_durable: bool = False
    ) -> None:
        """Acknowledged unless it was refused; a power loss has settled it already."""
        try:
            acknowledged = self._perform(act)
        except CommandError as error:
            if error.status not in REFUSALS:
                raise
            self.refusals.append(error.status)
            for change in changes:
                self.expected.withdraw(change)
            self._settled()
            return
        if acknowledged:
            for change in changes:
                self.expected.acknowledge(change, is_durable)

    def _perform(self, act: Callable[[], None]) -> bool:
        """False: power went within it."""
        try:
            act()
        except PowerCut:
            self._power_went()
            return False
        self._settled()
        return True

    def _settled(self) -> None:
        assert self._tables
        for checker in self.checkers:
            checker.settled(self._tables)

    def _power_went(self) -> None:
        """Opens the drive again, on power that may go once more meanwhile."""
        self.power_losses += 1
        self._unplug()
        cuts = int(self._rng.integers(0, 3))
        while cuts:
            cuts -= 1
            try:
                self._open(int(self._rng.integers(0, 12)))
                self.supply.go_off()
            except PowerCut:
                self._unplug()
        self._open()
        self.expected.power_lost(self._values(0, self.sectors))
        self._settled()

    def _open(self, goes_off_at: int | None = None) -> None:
        self.supply = PowerSupply(self._rng)
        self._files = plug_files(self._patch, self.supply)
        if goes_off_at is not None:
            self.supply.go_off_at(goes_off_at)
        self.subject = self._make(self._folder / "d", self.config, self._wrap)
        ftl = self.subject.ftl
        self._tables = Tables(ftl.table, ftl.reverse, ftl.superblocks)
        self._listen(ftl)
        self._settled()

    def _wrap(self, media: Media, superblocks: Superblocks) -> Media:
        faulty = self._faults(PowerLoss(media, self.supply))
        self._media = WatchedMedia(
            faulty, self.config.geometry, self.checkers, lambda: self._tables
        )
        return self._above(self._media)

    def _listen(self, ftl: Ftl) -> None:
        for name in _REPORTING:
            self._patch.setattr(ftl, name, self._reporting(getattr(ftl, name)))

    def _reporting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def report(*arguments: Any, **words: Any) -> Any:
            result = method(*arguments, **words)
            if result is not None:
                for checker in self.checkers:
                    checker.reported(result.ppns)
            return result

        return report

    def _unplug(self) -> None:
        """The process is gone: files are closed, and locks with them; nothing is written."""
        if self._tables:  # what fails to open closes its media itself
            self.subject.abandon()
            self._media.close()
        self._tables = None
        self._patch.undo()
        self._files.close_all()

    def _values(self, lpn: int, count: int) -> Any:
        words = self.subject.read(lpn, count).view(np.uint64).reshape(count, -1)
        torn = np.flatnonzero((words != words[:, :1]).any(axis=1))
        _require(not torn.size, f"sectors {lpn + torn[:8]} are mixtures")
        return words[:, 0].copy()


def _require(condition: object, detail: str) -> None:
    if not condition:
        raise Broken("acknowledged", detail)
