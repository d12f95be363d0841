"""What a handler is given beside its command."""

from dataclasses import dataclass

from csd_device.firmware.controller import Controller
from csd_device.firmware.events import EventRequests
from csd_device.firmware.hosts import Host
from csd_device.firmware.modelled_time import CommandTime


@dataclass(slots=True)
class Context:
    """The drive, who asks, and the time that the command has taken so far."""

    controller: Controller
    host: Host
    events: EventRequests  # of the queue pair that asks
    time: CommandTime
