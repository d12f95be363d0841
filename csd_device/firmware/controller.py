"""The drive's rooms and state, as handlers see them; what is done with them is in the handlers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from csd_device.clock import Clock, TimeMode
from csd_device.config import DriveConfig
from csd_device.dram import Arena
from csd_device.firmware.counters import BusyTime, Counters
from csd_device.firmware.event_log import EventLog
from csd_device.firmware.events import EventRequests
from csd_device.firmware.fault_injection import FaultInjection
from csd_device.firmware.features import Features
from csd_device.firmware.hosts import HostTable
from csd_device.firmware.idle_work import IdleWork
from csd_device.firmware.latency import Latencies
from csd_device.firmware.log_folder import LogFolder
from csd_device.firmware.logs import ErrorLog, StageLog
from csd_device.firmware.modelled_time import DriveTime
from csd_device.firmware.models import ModelCatalog
from csd_device.firmware.programs import ProgramStore
from csd_device.firmware.staging import Stager
from csd_device.firmware.thermal import Thermal
from csd_device.firmware.trace import Trace
from csd_device.ftl import Ftl


class OpenQueue(Protocol):
    """What logs say of a queue pair."""

    depth: int
    completed: int

    @property
    def in_flight(self) -> int: ...

    @property
    def host_id(self) -> str: ...


@dataclass(slots=True)
class Upkeep:
    """State of `firmware.upkeep`; all since power-on."""

    thermal: Thermal
    busy: BusyTime = field(default_factory=BusyTime)
    latencies: Latencies = field(default_factory=Latencies)
    due_ns: int = 0  # when temperature and warnings are looked at again
    unsaved_commands: int = 0
    warnings: int = 0  # critical warning bits
    worked_ns: tuple[int, int, int] = (0, 0, 0)  # NAND, link, compute, as last looked at
    media_errors: int = 0
    bad_superblocks: int = 0


@dataclass(slots=True)
class Controller:
    """Shared by all queue pairs of one drive."""

    config: DriveConfig
    serial: str
    clock: Clock
    time_mode: TimeMode
    time: DriveTime | None  # None: time is off
    ftl: Ftl
    arena: Arena
    stager: Stager  # holds the window and the unit cache
    models: ModelCatalog
    programs: ProgramStore
    hosts: HostTable
    features: Features
    folder: LogFolder
    counters: Counters
    errors: ErrorLog
    history: EventLog
    upkeep: Upkeep
    idle: IdleWork
    faults: FaultInjection
    stages: StageLog = field(default_factory=StageLog)
    events: dict[int, EventRequests] = field(default_factory=dict)  # by queue pair
    queues: dict[int, OpenQueue] = field(default_factory=dict)  # those open, by identifier
    trace: Trace | None = None  # None: none was started

    @property
    def window_path(self) -> Path:
        return self.stager.window.path

    @property
    def window_bytes(self) -> int:
        return self.stager.window.size_bytes
