"""Admin commands: what the drive is, what happened on it, and how it is set up."""

import json
from collections.abc import Callable
from typing import Any

from csd_device.errors import CommandError
from csd_device.firmware import upkeep
from csd_device.firmware.commands import (
    Data,
    Dword0,
    Format,
    GetFeatures,
    GetLogPage,
    Identify,
    KeepAlive,
    LoadProgram,
    MemoryRangeSet,
    ProgramActivation,
    SetFeatures,
)
from csd_device.firmware.context import Context
from csd_device.firmware.controller import Controller
from csd_device.firmware.event_log import Happening
from csd_device.firmware.identify import identify
from csd_device.firmware.memory_ranges import divide_memory
from csd_device.firmware.smart import endurance_report, smart_report
from csd_device.firmware.telemetry import telemetry_report
from csd_device.firmware.tracing import check_traceable, switch_trace, trace_page
from csd_protocol.opcodes import Feature, LogPage
from csd_protocol.status import Status


def handle_identify(context: Context, command: Identify) -> Data:
    """Raises CommandError (Invalid Field) for a CNS that this drive does not answer."""
    return _json(identify(context.controller, command.cns))


def handle_get_log_page(context: Context, command: GetLogPage) -> Data:
    """The page, or a part of it. Reading it lets events of its kind be told again.

    Raises CommandError: Invalid Log Page, Invalid Field for an offset beyond the page's end.
    """
    data = _log_page(context.controller, command, context.time.submitted_ns)
    if command.offset_bytes > len(data):
        raise CommandError(
            Status.INVALID_FIELD,
            f"offset {command.offset_bytes}; log page {command.log_id:02X}h has {len(data)} bytes",
        )
    context.events.unmask(command.log_id)
    end = command.offset_bytes + command.length_bytes if command.length_bytes else len(data)
    return Data(data[command.offset_bytes : end])


def _log_page(controller: Controller, command: GetLogPage, now_ns: int) -> bytes:
    if command.log_id == LogPage.TRACE:
        return trace_page(controller, anew=command.offset_bytes == 0)
    report = _REPORTS.get(command.log_id)
    if report is None:
        raise CommandError(
            Status.INVALID_LOG_PAGE,
            f"log page {command.log_id:02X}h; this drive has "
            + ", ".join(f"{page:02X}h" for page in LogPage),
        )
    return json.dumps(report(controller, now_ns)).encode()


_CHANGE_SHOWN = 200  # characters of what a fault was switched with

_REPORTS: dict[int, Callable[[Controller, int], dict[str, Any]]] = {
    LogPage.ERROR: lambda controller, _: controller.errors.report(),
    LogPage.SMART: smart_report,
    LogPage.TELEMETRY: telemetry_report,
    LogPage.ENDURANCE: lambda controller, _: endurance_report(controller),
    LogPage.EVENTS: lambda controller, _: controller.history.report(),
    LogPage.STAGE: lambda controller, _: controller.stages.report(),
}


def handle_set_features(context: Context, command: SetFeatures) -> None:
    """Raises CommandError (Invalid Field) naming what is wrong, a trace without time too."""
    controller = context.controller
    if command.feature_id == Feature.FAULT_INJECTION:
        controller.faults.change(command.data, controller.stager.window)
        upkeep.note(
            controller, Happening.FAULT_SWITCHED, change=command.data.decode()[:_CHANGE_SHOWN]
        )
        return
    if command.feature_id == Feature.TRACE:
        check_traceable(controller)
    controller.features.set(command.feature_id, command.value)
    if command.feature_id == Feature.TRACE:
        switch_trace(controller, command.value)
        return
    upkeep.note(controller, Happening.SET_FEATURE, feature=command.feature_id, value=command.value)
    upkeep.check_warnings(controller)


def handle_get_features(context: Context, command: GetFeatures) -> Dword0 | Data:
    """Raises CommandError (Invalid Field) for a feature that is not there."""
    if command.feature_id == Feature.FAULT_INJECTION:
        return _json(context.controller.faults.report())
    return Dword0(context.controller.features.get(command.feature_id))


def handle_keep_alive(context: Context, command: KeepAlive) -> None:
    """That the host is there is all it says."""


def handle_format(context: Context, command: Format) -> None:
    """Deallocates the whole namespace, its packed models with it; programs stay."""
    if command.lba_format != 0:
        raise CommandError(
            Status.INVALID_FIELD, f"LBA format {command.lba_format}; there is format 0 (4096 bytes)"
        )
    controller = context.controller
    upkeep.note(controller, Happening.FORMAT_START)
    controller.ftl.deallocate_all()
    context.time.program_pages(controller.ftl.flush())
    controller.models.note_change(0, controller.config.capacity_bytes)
    upkeep.note(controller, Happening.FORMAT_COMPLETION)


def handle_load_program(context: Context, command: LoadProgram) -> Dword0:
    """Takes a chunk, or unloads; the result is the program's identifier."""
    controller, number = context.controller, command.program
    if command.unload:
        controller.programs.unload(number)
        upkeep.note(controller, Happening.PROGRAM_UNLOAD, program=number)
    else:
        context.time.receive(len(command.chunk))
        if controller.programs.receive(command):
            size = command.total_bytes
            upkeep.note(controller, Happening.PROGRAM_LOAD, program=number, bytes=size)
    controller.hosts.forget_program(number)
    return Dword0(command.program)


def handle_program_activation(context: Context, command: ProgramActivation) -> None:
    controller, number, active = context.controller, command.program, command.active
    controller.programs.set_active(number, active)
    upkeep.note(controller, Happening.PROGRAM_ACTIVATION, program=number, active=active)


def handle_memory_range_set(context: Context, command: MemoryRangeSet) -> None:
    divide_memory(context.controller, command.window_bytes, command.unit_cache_bytes)


def _json(report: dict[str, Any]) -> Data:
    return Data(json.dumps(report).encode())
