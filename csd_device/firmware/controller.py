"""The drive's rooms and state, as handlers see them; what is done with them is in the handlers."""

from dataclasses import dataclass, field
from pathlib import Path

from csd_device.clock import Clock, TimeMode
from csd_device.config import DriveConfig
from csd_device.dram import Arena
from csd_device.firmware.counters import Counters
from csd_device.firmware.events import EventRequests
from csd_device.firmware.fault_injection import FaultInjection
from csd_device.firmware.features import Features
from csd_device.firmware.hosts import HostTable
from csd_device.firmware.idle_work import IdleWork
from csd_device.firmware.logs import ErrorLog, StageLog
from csd_device.firmware.modelled_time import DriveTime
from csd_device.firmware.models import ModelCatalog
from csd_device.firmware.programs import ProgramStore
from csd_device.firmware.staging import Stager
from csd_device.ftl import Ftl


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
    idle: IdleWork
    faults: FaultInjection
    counters: Counters = field(default_factory=Counters)
    errors: ErrorLog = field(default_factory=ErrorLog)
    stages: StageLog = field(default_factory=StageLog)
    events: dict[int, EventRequests] = field(default_factory=dict)  # by queue pair

    @property
    def window_path(self) -> Path:
        return self.stager.window.path

    @property
    def window_bytes(self) -> int:
        return self.stager.window.size_bytes
