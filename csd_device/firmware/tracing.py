"""Feature C1h and log page C2h: a trace of the drive, switched and read by a host."""

import json

from csd_device.errors import CommandError
from csd_device.firmware.controller import Controller
from csd_device.firmware.trace import Trace
from csd_device.firmware.trace_events import trace_events
from csd_protocol.status import Status


def check_traceable(controller: Controller) -> None:
    """Raises CommandError (Invalid Field) with time off."""
    if controller.time is None:
        raise CommandError(
            Status.INVALID_FIELD,
            "time is off: nothing is modelled to trace. Serve the drive with --time virtual",
        )


def switch_trace(controller: Controller, limit: int) -> None:
    """Starts a new trace of at most `limit` spans; with 0 ends the one that runs."""
    assert controller.time is not None
    if controller.trace is not None:
        controller.trace.stop()
    if limit:
        controller.trace = Trace(controller.time, controller.time.nand, limit)


def trace_page(controller: Controller, anew: bool) -> bytes:
    """The trace as a file for ui.perfetto.dev; `anew`: as of now, else as it was last rendered.

    Raises CommandError (Command Sequence Error) when none was started.
    """
    check_traceable(controller)
    trace = controller.trace
    if trace is None:
        raise CommandError(
            Status.SEQUENCE_ERROR, "no trace was started: set feature C1h to the spans to keep"
        )
    if anew:
        about = {
            "drive": controller.config.name,
            "time": controller.time_mode.value,
            "spans_left_out": trace.dropped,
        }
        page = {"displayTimeUnit": "ns", "otherData": about, "traceEvents": trace_events(trace)}
        trace.page = json.dumps(page, separators=(",", ":")).encode()
    return trace.page
