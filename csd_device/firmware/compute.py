"""Compute commands: run a program, stage what it chose, release it, and what the host holds."""

from csd_device.compute import ProgramInput
from csd_device.errors import CommandError
from csd_device.firmware import upkeep
from csd_device.firmware.commands import (
    ExecuteProgram,
    ExecuteResult,
    HostResidency,
    PredictAndStage,
    Release,
    Stage,
    StageResult,
    Target,
    Wanted,
)
from csd_device.firmware.context import Context
from csd_device.firmware.experts import top_experts
from csd_device.firmware.models import LoadedModel
from csd_device.firmware.prediction import Prediction
from csd_device.firmware.staging import NO_UNITS
from csd_protocol.status import Status


def handle_execute_program(context: Context, command: ExecuteProgram) -> ExecuteResult:
    """The top fraction of one layer's units, or what those not computed add; nothing staged."""
    if not 0 <= command.keep <= 1:
        raise CommandError(Status.INVALID_FIELD, f"a kept fraction of {command.keep}")
    model = context.controller.models.get(command.model, context.time)
    context.time.receive(command.hidden.nbytes + command.units.nbytes)
    prediction = _prediction(context, model, command)
    site = model.find(prediction.role, command.layer)
    if command.wanted is Wanted.CORRECTION:
        values = prediction.correction(site, command.units, context.time)
        context.time.send(values.nbytes)
        return ExecuteResult(NO_UNITS, values)
    units = prediction.top_units(site, command.keep, context.time)
    context.time.send(units.nbytes)
    return ExecuteResult(units)


def handle_predict_and_stage(context: Context, command: PredictAndStage) -> StageResult:
    """Stages what the program chooses; `Stager.stage` says what it raises."""
    _admit(context, command)
    context.time.receive(command.hidden.nbytes)
    model = context.controller.models.get(command.model, context.time)
    prediction = _prediction(context, model, command)
    if command.experts is not None:
        gate = _program(context, model, command.experts.program, command)
        count = command.experts.count
        prediction.admit(top_experts(model, command.targets, gate, count, context.time))
    if command.heads is not None:
        prediction.leave_heads_to(_program(context, model, command.heads, command))
    return _stage(context, model, command.token, command.targets, prediction)


def handle_stage(context: Context, command: Stage) -> StageResult:
    """Stages named units; `Stager.stage` says what it raises."""
    _admit(context, command)
    model = context.controller.models.get(command.model, context.time)
    return _stage(context, model, None, command.targets, None)


def handle_release(context: Context, command: Release) -> None:
    """Gives leases back, those named or all of this host's.

    Raises CommandError (No Such Lease) for the first one not held; the others go back all the same.
    """
    window, owner = context.controller.stager.window, context.host.host_id
    if not command.leases:
        window.release_owner(owner)
    refused: CommandError | None = None
    for lease in command.leases:
        try:
            window.release(lease, owner)
        except CommandError as error:
            refused = refused or error
    if refused:
        raise refused


def handle_host_residency(context: Context, command: HostResidency) -> None:
    """Raises CommandError: No Such Packed Model, No Such Site, Invalid Field, DRAM exceeded."""
    model = context.controller.models.get(command.model, context.time)
    for said in command.sites:
        context.controller.hosts.set_residency(context.host, model.site(said.site), said)


def _admit(context: Context, command: PredictAndStage | Stage) -> None:
    """Leases go back first. Raises CommandError (Window Unavailable) before a program is told.

    What only goes to DRAM needs no window.
    """
    stager = context.controller.stager
    stager.pass_back(context.host, command.release)
    if not command.targets or not all(target.to_dram for target in command.targets):
        context.controller.faults.admit_staging(stager.window)


def _stage(
    context: Context,
    model: LoadedModel,
    token: int | None,
    targets: tuple[Target, ...],
    prediction: Prediction | None,
) -> StageResult:
    controller = context.controller
    result = controller.stager.stage(context.host, model, targets, prediction, context.time)
    for site in result.sites:
        controller.counters.staged_bytes += site.length_bytes
        controller.counters.nand_page_reads += site.nand_page_reads
        if site.units_lost:
            upkeep.note_media_error(
                controller,
                f"{site.units_lost} units of {model.site(site.site).name} cannot be brought to "
                "DRAM; who stages them to the window learns which",
            )
    timing = context.time.timing()
    controller.stages.add(context.host.host_id, model.model, token, result, timing)
    return result


def _prediction(
    context: Context, model: LoadedModel, command: PredictAndStage | ExecuteProgram
) -> Prediction:
    """The command's program with its input, after it was told what the host observed."""
    prediction = _program(context, model, command.program, command)
    for observed in command.observed:
        context.time.receive(observed.units.nbytes)
        prediction.observe(model.site(observed.site), observed.units)
    return prediction


def _program(
    context: Context, model: LoadedModel, number: int, command: PredictAndStage | ExecuteProgram
) -> Prediction:
    """A program with the command's input."""
    given = ProgramInput(command.hidden, command.token, command.origin)
    controller = context.controller
    return Prediction(controller.programs, controller.hosts, context.host, model, number, given)
