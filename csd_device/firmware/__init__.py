"""The drive's firmware: commands in, completions out, no I/O of its own towards the host.

Controller                  the drive's rooms and its state, shared by all queue pairs
QueuePair                   submit, next_due_ns, pop_due, close: a queue pair without a transport
commands                    what is submitted and what comes back
"""

from csd_device.firmware.controller import Controller
from csd_device.firmware.queue_pair import QueuePair

__all__ = ["Controller", "QueuePair"]
