"""Puts the rooms together: a drive that is usable in-process, with no network.

drive = Drive.open(load_config("tiny"), Path("drive.csd"), clock=VirtualClock(),
                   time_mode=TimeMode.VIRTUAL, window_path=None)
queue = drive.connect("host name", "host id", queue_depth=0)      # -> QueuePair
queue.submit(cid, command, drive.clock.now_ns())
completions = queue.pop_due(drive.clock.now_ns())                 # see queue.next_due_ns()
queue.close()
drive.close()
"""

import hashlib
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csd_device.clock import Clock, TimeMode
from csd_device.config import SECTOR_BYTES, DriveConfig
from csd_device.dram import Arena, UnitCache, Window
from csd_device.errors import CommandError, DriveRefused
from csd_device.firmware import Controller, QueuePair, upkeep
from csd_device.firmware.batch import read_batch, read_closed_loop
from csd_device.firmware.controller import Upkeep
from csd_device.firmware.dispatch import note_failure
from csd_device.firmware.event_log import EventLog
from csd_device.firmware.fault_injection import FaultInjection
from csd_device.firmware.features import Features
from csd_device.firmware.hosts import HostTable
from csd_device.firmware.idle_work import IdleWork
from csd_device.firmware.log_folder import LogFolder
from csd_device.firmware.logs import ErrorLog
from csd_device.firmware.memory_ranges import UNIT_CACHE, WINDOW
from csd_device.firmware.modelled_time import DriveTime
from csd_device.firmware.models import ModelCatalog
from csd_device.firmware.programs import ProgramStore
from csd_device.firmware.staging import Stager
from csd_device.firmware.telemetry import telemetry_report
from csd_device.firmware.thermal import Thermal
from csd_device.ftl import Ftl
from csd_device.ftl.translation import Counters, Wrap
from csd_device.nand import Timeline
from csd_device.nand.direct_media import Begin, at_once
from csd_device.nand.faults import FaultCounters, MediaSwitch, PowerCut, Surroundings
from csd_device.nand.media import Media
from csd_device.nand.superblocks import Superblocks
from csd_device.nand.timeline import BusyTimes
from csd_protocol.status import Status

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

SHARED_MEMORY = Path("/dev/shm")
HOST_ID_MAX = 256  # characters
_MAPPING = "mapping"
_PROGRAMS_FOLDER = "programs"


class Drive:
    """An open drive; one at a time for each media folder."""

    def __init__(self, controller: Controller) -> None:
        """Use `Drive.open`."""
        self._controller = controller
        self._queues: dict[int, QueuePair] = {}
        self._queue_ids = count(1)
        self._is_closed = False

    @classmethod
    def open(
        cls,
        config: DriveConfig,
        media_path: Path,
        *,
        clock: Clock,
        time_mode: TimeMode,
        window_path: Path | None = None,
        wrap: Wrap | None = None,
        begin: Begin = at_once,
    ) -> "Drive":
        """Opens the media folder, made when it is not there, and the window.

        `wrap` puts decorators around the media, `begin` carries direct reads out: `Ftl.open`.

        Without `window_path` the window lies on /dev/shm, named after the media's full path.
        Raises DriveRefused for media of another geometry or version, media or a window in use, and
        shared memory too small for the window.
        """

        def wrapped(media: Media, superblocks: Superblocks) -> Media:
            return MediaSwitch(wrap(media, superblocks) if wrap else media)

        ftl = Ftl.open(media_path, config, wrapped, begin)
        try:
            serial = _serial(media_path)
            path = window_path or SHARED_MEMORY / f"csd-window-{serial}"
            window = Window(path, config.dram.window_bytes)
        except BaseException:
            ftl.close()
            raise
        drive = cls(_assemble(config, media_path, serial, clock, time_mode, ftl, window))
        drive._begin_faults()
        return drive

    @property
    def clock(self) -> Clock:
        return self._controller.clock

    @property
    def time_mode(self) -> TimeMode:
        return self._controller.time_mode

    @property
    def config(self) -> DriveConfig:
        return self._controller.config

    @property
    def capacity_bytes(self) -> int:
        """Size of the namespace."""
        return self._controller.config.capacity_bytes

    @property
    def mdts_bytes(self) -> int:
        """Most data that one command moves over the link."""
        return self._controller.config.queues.mdts_bytes

    @property
    def window_path(self) -> Path:
        return self._controller.window_path

    @property
    def window_bytes(self) -> int:
        return self._controller.window_bytes

    @property
    def used_bytes(self) -> int:
        """Of the namespace, that holds data."""
        return self._controller.ftl.used_sectors * SECTOR_BYTES

    def mapped_share(self, slba: int, blocks: int) -> float:
        """Which part of these blocks holds data; a read of the others takes no flash time."""
        return float(self._controller.ftl.is_mapped(slba, blocks).mean())

    def ftl_counters(self) -> Counters:
        """What the FTL wrote and erased since the drive was opened."""
        return self._controller.ftl.counters()

    def busy_times(self) -> BusyTimes:
        """How long each channel and die worked since the drive was opened; with time on."""
        assert self._controller.time is not None
        return self._controller.time.nand.busy_times()

    def idle_ns(self) -> int:
        """When the NAND is done with all that was asked for so far; with time on."""
        assert self._controller.time is not None
        return self._controller.time.nand.idle_ns()

    def connect(self, host_name: str, host_id: str, queue_depth: int = 0) -> QueuePair:
        """A new queue pair. `queue_depth` 0 is the most that there is, as is anything above.

        Raises CommandError: Invalid Field for a host identifier that is empty or too long,
        Submission Queue Full when the drive has no queue pair left.
        """
        queues = self._controller.config.queues
        if not 0 < len(host_id) <= HOST_ID_MAX or queue_depth < 0:
            raise CommandError(
                Status.INVALID_FIELD,
                f"a host identifier of {len(host_id)} characters, queue depth {queue_depth}; "
                f"1 to {HOST_ID_MAX} characters, and 0 or more",
            )
        self._forget_closed()
        if len(self._queues) >= queues.max_queues:
            raise CommandError(
                Status.QUEUE_FULL, f"all {queues.max_queues} queue pairs of the drive are open"
            )
        depth = min(queue_depth or queues.max_depth, queues.max_depth)
        host = self._controller.hosts.attach(host_id, host_name)
        queue = QueuePair(self._controller, host, next(self._queue_ids), depth)
        self._queues[queue.queue_id] = queue
        return queue

    @property
    def is_off(self) -> bool:
        """Whether its power is gone (a fault): it answers nothing until it is opened again."""
        return self._controller.faults.is_off

    def read_batch(self, slbas: I64, blocks: int, arrival_ns: I64, out: U8 | None = None) -> I64:
        """Many reads at once, and when each is done [n]: `firmware.batch.read_batch`."""
        done = read_batch(self._controller, slbas, blocks, arrival_ns, out)
        self._pass_to(done)
        return done

    def read_closed_loop(
        self, slbas: I64, blocks: int, slots_ns: I64, out: U8 | None = None
    ) -> tuple[I64, I64]:
        """Reads at a depth, each when one completes: `firmware.batch.read_closed_loop`."""
        submitted, done = read_closed_loop(self._controller, slbas, blocks, slots_ns, out)
        self._pass_to(done)
        return submitted, done

    def _pass_to(self, done: I64) -> None:
        if self.time_mode is TimeMode.VIRTUAL and done.size:
            self.clock.advance_to(int(done.max()))

    def telemetry(self) -> dict[str, Any]:
        """Log page 07h as of now, for a daemon that shows it elsewhere."""
        return telemetry_report(self._controller, self.clock.now_ns())

    def close(self) -> None:
        """Closes all queue pairs, makes what was written last, and gives media and window back."""
        if self._is_closed:
            return
        self._is_closed = True
        for queue in self._queues.values():
            queue.close()
        self._queues.clear()
        self._controller.stager.window.close()
        if self.is_off:
            self._controller.folder.close()
            self._controller.ftl.abandon()
            return
        try:
            self._power_off()
        except PowerCut:
            if not self.is_off:  # not by this drive's own fault
                raise

    def _power_off(self) -> None:
        controller = self._controller
        try:
            controller.ftl.flush()
            upkeep.power_off(controller)
        finally:
            controller.folder.close()
            controller.ftl.close()

    def _begin_faults(self) -> None:
        """What `[faults]` says is on from here on. Raises DriveRefused, the drive closed."""
        try:
            self._controller.faults.apply(self.config.faults, self._controller.stager.window)
        except (ValueError, CommandError) as error:
            self.close()
            raise DriveRefused(f"[faults] of {self.config.name}: {error}") from error

    def _forget_closed(self) -> None:
        closed = [number for number, queue in self._queues.items() if queue.is_closed]
        for number in closed:
            del self._queues[number]


def _assemble(
    config: DriveConfig,
    media_path: Path,
    serial: str,
    clock: Clock,
    time_mode: TimeMode,
    ftl: Ftl,
    window: Window,
) -> Controller:
    arena = Arena(config.dram.total_bytes)
    folder = LogFolder(media_path)
    counters, error_count = upkeep.restore_counters(folder)
    arena.allot(_MAPPING, ftl.mapping_bytes)
    arena.allot(WINDOW, config.dram.window_bytes)
    arena.allot(UNIT_CACHE, config.dram.unit_cache_bytes)
    stager = Stager(ftl, window, UnitCache(config.dram.unit_cache_bytes))
    timeline = Timeline(config.geometry, config.timing)
    timed = time_mode is not TimeMode.OFF
    around = Surroundings(config, ftl.superblocks, clock.now_ns, FaultCounters())
    time = DriveTime(config, timeline) if timed else None
    controller = Controller(
        config=config,
        serial=serial,
        clock=clock,
        time_mode=time_mode,
        time=time,
        ftl=ftl,
        arena=arena,
        stager=stager,
        models=ModelCatalog(ftl, arena, lambda model: stager.cache.drop_model(model)),
        programs=ProgramStore(media_path / _PROGRAMS_FOLDER, arena),
        hosts=HostTable(arena),
        features=Features(config.queues),
        folder=folder,
        counters=counters,
        errors=ErrorLog(folder, error_count),
        history=EventLog(folder),
        upkeep=Upkeep(Thermal(config.thermal)),
        idle=IdleWork(ftl, time),
        faults=FaultInjection(config, ftl, timeline if timed else None, around),
    )
    upkeep.power_on(controller)
    for error in controller.programs.refused:
        note_failure(controller, error, queue=0, cid=0, command="open", at_ns=clock.now_ns())
    return controller


def _serial(media_path: Path) -> str:
    """Sixteen hexadecimal digits that stay with the place of the media."""
    return hashlib.sha256(str(media_path.resolve()).encode()).hexdigest()[:16].upper()
