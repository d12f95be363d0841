"""From a command to its handler, and from what comes of it to a status."""

from collections.abc import Callable
from typing import Any

from csd_device.errors import CommandError
from csd_device.firmware import admin, compute, nvm, upkeep
from csd_device.firmware import commands as c
from csd_device.firmware.context import Context
from csd_device.firmware.controller import Controller
from csd_device.firmware.counters import Counters
from csd_device.firmware.events import WRITE_ERROR
from csd_protocol.status import Status

Handler = Callable[[Context, Any], c.Result]

# Abort and AsyncEvent are the queue pair's own: they speak of its other commands.
_ADMIN: dict[type, Handler] = {
    c.Identify: admin.handle_identify,
    c.GetLogPage: admin.handle_get_log_page,
    c.SetFeatures: admin.handle_set_features,
    c.GetFeatures: admin.handle_get_features,
    c.KeepAlive: admin.handle_keep_alive,
    c.Format: admin.handle_format,
    c.LoadProgram: admin.handle_load_program,
    c.ProgramActivation: admin.handle_program_activation,
    c.MemoryRangeSet: admin.handle_memory_range_set,
}
_NVM: dict[type, Handler] = {
    c.Read: nvm.handle_read,
    c.Compare: nvm.handle_compare,
    c.Verify: nvm.handle_verify,
    c.Flush: nvm.handle_flush,
    c.Write: nvm.handle_write,
    c.WriteZeroes: nvm.handle_write_zeroes,
    c.DatasetManagement: nvm.handle_dataset_management,
    c.Copy: nvm.handle_copy,
    c.DefinePatterns: nvm.handle_define_patterns,
    c.WritePatterns: nvm.handle_write_patterns,
}
_COMPUTE: dict[type, Handler] = {
    c.ExecuteProgram: compute.handle_execute_program,
    c.PredictAndStage: compute.handle_predict_and_stage,
    c.Stage: compute.handle_stage,
    c.Release: compute.handle_release,
    c.HostResidency: compute.handle_host_residency,
}
HANDLERS: dict[type, Handler] = _ADMIN | _NVM | _COMPUTE

_MEDIA_ERRORS = {Status.UNRECOVERED_READ, Status.GUARD_CHECK, Status.WRITE_FAULT}


def dispatch(context: Context, command: c.Command) -> c.Result:
    """Carries the command out. Raises CommandError for what cannot be."""
    _count(context.controller.counters, type(command))
    context.controller.idle.use_time_until(context.time.submitted_ns)
    context.time.fetch()
    return HANDLERS[type(command)](context, command)


def note_failure(
    controller: Controller, error: CommandError, *, queue: int, cid: int, command: str, at_ns: int
) -> None:
    """Counts and logs a failed command; a media error also raises an asynchronous event."""
    controller.counters.failed_commands += 1
    controller.errors.add(
        error.status,
        error.detail,
        queue=queue,
        cid=cid,
        command=command,
        at_ns=at_ns,
        power_cycle=controller.counters.power_cycles,
    )
    if error.status in _MEDIA_ERRORS:
        upkeep.note_media_error(controller, error.detail)
    if error.status is Status.WRITE_FAULT:
        upkeep.raise_everywhere(controller, WRITE_ERROR)
    if error.status is Status.WRITE_PROTECTED:
        upkeep.check_warnings(controller)


def _count(counters: Counters, kind: type) -> None:
    """As NVMe counts: Read and Compare are host reads, Write is the host write command."""
    if kind in _COMPUTE:
        counters.compute_commands += 1
    elif kind in _NVM:
        counters.nvm_commands += 1
        counters.host_read_commands += kind is c.Read or kind is c.Compare
        counters.host_write_commands += kind is c.Write
    else:
        counters.admin_commands += 1
