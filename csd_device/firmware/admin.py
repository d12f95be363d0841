"""Admin commands: what the drive is, what happened on it, and how it is set up."""

import json
from typing import Any

from csd_device.errors import CommandError
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
from csd_device.firmware.identify import identify
from csd_device.firmware.memory_ranges import divide_memory
from csd_device.firmware.smart import smart_report
from csd_protocol.opcodes import LogPage
from csd_protocol.status import Status


def handle_identify(context: Context, command: Identify) -> Data:
    """Raises CommandError (Invalid Field) for a CNS that this drive does not answer."""
    return _json(identify(context.controller, command.cns))


def handle_get_log_page(context: Context, command: GetLogPage) -> Data:
    """Raises CommandError (Invalid Log Page). Reading a page lets its events be told again."""
    controller = context.controller
    if command.log_id == LogPage.ERROR:
        report = controller.errors.report()
    elif command.log_id == LogPage.SMART:
        report = smart_report(controller, context.time.submitted_ns)
    elif command.log_id == LogPage.STAGE:
        report = controller.stages.report()
    else:
        raise CommandError(
            Status.INVALID_LOG_PAGE,
            f"log page {command.log_id:02X}h; this drive has "
            + ", ".join(f"{page:02X}h" for page in LogPage),
        )
    context.events.unmask(command.log_id)
    return _json(report)


def handle_set_features(context: Context, command: SetFeatures) -> None:
    context.controller.features.set(command.feature_id, command.value)


def handle_get_features(context: Context, command: GetFeatures) -> Dword0:
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
    controller.ftl.deallocate_all()
    context.time.program_pages(controller.ftl.flush())
    controller.models.note_change(0, controller.config.capacity_bytes)


def handle_load_program(context: Context, command: LoadProgram) -> Dword0:
    """Takes a chunk, or unloads; the result is the program's identifier."""
    controller = context.controller
    if command.unload:
        controller.programs.unload(command.program)
    else:
        context.time.receive(len(command.chunk))
        controller.programs.receive(command)
    controller.hosts.forget_program(command.program)
    return Dword0(command.program)


def handle_program_activation(context: Context, command: ProgramActivation) -> None:
    context.controller.programs.set_active(command.program, command.active)


def handle_memory_range_set(context: Context, command: MemoryRangeSet) -> None:
    divide_memory(context.controller, command.window_bytes, command.unit_cache_bytes)


def _json(report: dict[str, Any]) -> Data:
    return Data(json.dumps(report).encode())
