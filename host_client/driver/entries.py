"""Driver calls to submission entries, and completion entries to what callers get."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from csd_protocol import PROTOCOL_MAJOR, PROTOCOL_MINOR
from csd_protocol.csd.v1 import csd_pb2 as pb
from csd_protocol.opcodes import AdminOpcode, ComputeOpcode, Feature, NvmOpcode
from host_client.driver.commands import (
    F32,
    NOTHING_TOLD,
    U16,
    U32,
    AsyncEvent,
    LostUnits,
    Residency,
    Staged,
    StagedSite,
    StageTarget,
    Timing,
    Told,
)
from host_client.driver.errors import CommandFailed

NAMESPACE = 1


@dataclass(frozen=True, slots=True)
class Command:
    """A submission entry without its CID, and what people call it."""

    what: str
    entry: pb.SubmissionEntry


def _admin(what: str, opcode: AdminOpcode, **body: Any) -> Command:
    return Command(what, pb.SubmissionEntry(set=pb.COMMAND_SET_ADMIN, opcode=opcode, **body))


def _nvm(what: str, opcode: NvmOpcode, **body: Any) -> Command:
    entry = pb.SubmissionEntry(set=pb.COMMAND_SET_NVM, opcode=opcode, nsid=NAMESPACE, **body)
    return Command(what, entry)


def _compute(what: str, opcode: ComputeOpcode, **body: Any) -> Command:
    entry = pb.SubmissionEntry(set=pb.COMMAND_SET_COMPUTE, opcode=opcode, nsid=NAMESPACE, **body)
    return Command(what, entry)


# ---- admin -----------------------------------------------------------------------------------


def connect(host_name: str, host_id: str, queue_depth: int) -> Command:
    body = pb.Connect(
        protocol_major=PROTOCOL_MAJOR,
        protocol_minor=PROTOCOL_MINOR,
        queue_depth=queue_depth,
        host_name=host_name,
        host_id=host_id,
    )
    return _admin("Connect", AdminOpcode.CONNECT, connect=body)


def identify(cns: int) -> Command:
    # protobuf's enums are open: a CNS that this version does not name travels as its number.
    body = pb.Identify(cns=cns)  # type: ignore[arg-type]
    return _admin(f"Identify {cns:02X}h", AdminOpcode.IDENTIFY, identify=body)


def get_log_page(log_id: int, offset_bytes: int = 0, length_bytes: int = 0) -> Command:
    """`length_bytes` 0: to the end of the page."""
    body = pb.GetLogPage(log_id=log_id, offset_bytes=offset_bytes, length_bytes=length_bytes)
    return _admin(f"Get Log Page {log_id:02X}h", AdminOpcode.GET_LOG_PAGE, get_log_page=body)


def set_faults(change: Mapping[str, Any]) -> Command:
    """`change`: {"name": ..., "settings": {...} or None: off}; empty: all faults off."""
    data = json.dumps(change).encode()
    body = pb.Features(feature_id=Feature.FAULT_INJECTION, data=data)
    what = f"Set Features: fault {change.get('name', 'injection')}"
    return _admin(what, AdminOpcode.SET_FEATURES, features=body)


def get_faults() -> Command:
    body = pb.Features(feature_id=Feature.FAULT_INJECTION)
    return _admin("Get Features: fault injection", AdminOpcode.GET_FEATURES, features=body)


def abort(cid: int) -> Command:
    return _admin(f"Abort of CID {cid}", AdminOpcode.ABORT, abort=pb.Abort(cid=cid))


def set_feature(feature: int, value: int) -> Command:
    body = pb.Features(feature_id=feature, value=value)
    return _admin(f"Set Features {feature:02X}h", AdminOpcode.SET_FEATURES, features=body)


def get_feature(feature: int) -> Command:
    body = pb.Features(feature_id=feature)
    return _admin(f"Get Features {feature:02X}h", AdminOpcode.GET_FEATURES, features=body)


def async_event() -> Command:
    body = pb.AsyncEvent()
    return _admin("Asynchronous Event Request", AdminOpcode.ASYNC_EVENT, async_event=body)


def keep_alive() -> Command:
    return _admin("Keep Alive", AdminOpcode.KEEP_ALIVE, keep_alive=pb.KeepAlive())


def load_program(program: int, total_bytes: int, offset_bytes: int, chunk: bytes) -> Command:
    body = pb.LoadProgram(
        program=program, total_bytes=total_bytes, offset_bytes=offset_bytes, chunk=chunk
    )
    return _admin(f"Load Program {program}", AdminOpcode.LOAD_PROGRAM, load_program=body)


def unload_program(program: int) -> Command:
    body = pb.LoadProgram(program=program, unload=True)
    return _admin(f"unload of program {program}", AdminOpcode.LOAD_PROGRAM, load_program=body)


def activate_program(program: int, active: bool) -> Command:
    what = f"Program Activation {program}"
    body = pb.ProgramActivation(program=program, active=active)
    return _admin(what, AdminOpcode.PROGRAM_ACTIVATION, program_activation=body)


# ---- NVM -------------------------------------------------------------------------------------


def flush() -> Command:
    return _nvm("Flush", NvmOpcode.FLUSH, flush=pb.Flush())


def write(slba: int, data: bytes, fua: bool) -> Command:
    body = pb.Write(slba=slba, data=data, fua=fua)
    return _nvm(f"Write of {len(data)} bytes at block {slba}", NvmOpcode.WRITE, write=body)


def read(slba: int, blocks: int) -> Command:
    body = pb.BlockRange(slba=slba, blocks=blocks)
    return _nvm(f"Read of {blocks} blocks at block {slba}", NvmOpcode.READ, blocks=body)


def deallocate(slba: int, blocks: int) -> Command:
    body = pb.DatasetManagement(ranges=[pb.BlockRange(slba=slba, blocks=blocks)])
    what = f"deallocation of {blocks} blocks at block {slba}"
    return _nvm(what, NvmOpcode.DATASET_MANAGEMENT, dataset_management=body)


def copy(from_slba: int, to_slba: int, blocks: int) -> Command:
    source = pb.BlockRange(slba=from_slba, blocks=blocks)
    body = pb.Copy(dst_slba=to_slba, sources=[source])
    what = f"Copy of {blocks} blocks from block {from_slba} to {to_slba}"
    return _nvm(what, NvmOpcode.COPY, copy=body)


def define_patterns(data: bytes) -> Command:
    body = pb.DefinePatterns(data=data)
    what = f"Define Patterns of {len(data)} bytes"
    return _nvm(what, NvmOpcode.DEFINE_PATTERNS, define_patterns=body)


def write_patterns(slba: int, numbers: U16) -> Command:
    body = pb.WritePatterns(slba=slba, patterns=numbers.astype("<u2").tobytes())
    what = f"Write Patterns of {numbers.size} blocks at block {slba}"
    return _nvm(what, NvmOpcode.WRITE_PATTERNS, write_patterns=body)


# ---- compute and staging ---------------------------------------------------------------------


def execute_program(
    program: int,
    model: int,
    layer: int,
    hidden: F32,
    keep: float,
    told: Told = NOTHING_TOLD,
    token: int = 0,
) -> Command:
    body = pb.ExecuteProgram(
        program=program,
        model=model,
        layer=layer,
        hidden=_float_bytes(hidden),
        rows=_rows(hidden),
        keep=keep,
        token=token,
        observed=_observed(told),
        origin=_origin(told),
    )
    what = f"Execute Program {program} for layer {layer}"
    return _compute(what, ComputeOpcode.EXECUTE_PROGRAM, execute_program=body)


def correct(program: int, model: int, layer: int, inputs: F32, computed: U32) -> Command:
    body = pb.ExecuteProgram(
        program=program,
        model=model,
        layer=layer,
        hidden=_float_bytes(inputs),
        rows=_rows(inputs),
        wanted=pb.ExecuteProgram.WANTED_CORRECTION,
        units=_word_bytes(computed),
    )
    what = f"correction by program {program} for layer {layer}"
    return _compute(what, ComputeOpcode.EXECUTE_PROGRAM, execute_program=body)


def predict_and_stage(
    model: int,
    program: int,
    token: int,
    hidden: F32,
    targets: Iterable[StageTarget],
    release: Iterable[int] = (),
    told: Told = NOTHING_TOLD,
) -> Command:
    body = pb.PredictAndStage(
        model=model,
        program=program,
        token=token,
        hidden=_float_bytes(hidden),
        rows=_rows(hidden),
        targets=[_target(target) for target in targets],
        release=release,
        observed=_observed(told),
        origin=_origin(told),
        experts=_experts(told),
        heads=told.heads,
    )
    what = f"PREDICT_AND_STAGE of model {model}"
    return _compute(what, ComputeOpcode.PREDICT_AND_STAGE, predict_and_stage=body)


def stage(model: int, targets: Iterable[StageTarget], release: Iterable[int] = ()) -> Command:
    body = pb.Stage(model=model, targets=[_target(target) for target in targets], release=release)
    return _compute(f"STAGE of model {model}", ComputeOpcode.STAGE, stage=body)


def release(leases: Iterable[int]) -> Command:
    return _compute("RELEASE", ComputeOpcode.RELEASE, release=pb.Release(leases=leases))


def host_residency(model: int, sites: Mapping[int, Residency]) -> Command:
    body = pb.HostResidency(model=model, held=[_held(*item) for item in sites.items()])
    return _compute("HOST_RESIDENCY", ComputeOpcode.HOST_RESIDENCY, host_residency=body)


def _float_bytes(values: F32) -> bytes:
    return np.ascontiguousarray(values, np.dtype("<f4")).tobytes()


def _word_bytes(values: U32) -> bytes:
    return np.ascontiguousarray(values, np.dtype("<u4")).tobytes()


def _observed(told: Told) -> list[pb.Observed]:
    return [
        pb.Observed(site=site, units=_word_bytes(units)) for site, units in told.observed.items()
    ]


def _origin(told: Told) -> pb.HiddenOrigin | None:
    if told.origin is None:
        return None
    return pb.HiddenOrigin(layer=told.origin.layer, behind_attention=told.origin.behind_attention)


def _experts(told: Told) -> pb.TopExperts | None:
    if told.experts is None:
        return None
    return pb.TopExperts(program=told.experts.program, count=told.experts.count)


def _rows(values: F32) -> int:
    return values.shape[0] if values.ndim == 2 else 1


def _target(target: StageTarget) -> pb.StageTarget:
    entry = pb.StageTarget(
        site=target.site,
        ignore_residency=target.ignore_residency,
        copy=target.copy,
        to_dram=target.to_dram,
        elsewhere=[
            pb.Elsewhere(copy=copy, units=_word_bytes(units)) for copy, units in target.elsewhere
        ],
    )
    if target.units is not None:
        entry.units = _word_bytes(target.units)
    elif target.keep is not None:
        entry.keep = target.keep
    else:
        entry.all = True
        entry.first, entry.end = target.first, target.end or 0
    return entry


def _held(site: int, held: Residency) -> pb.HostResidency.Held:
    if isinstance(held, np.ndarray):
        bitmap = np.packbits(held, bitorder="little").tobytes()
        return pb.HostResidency.Held(site=site, bitmap=bitmap)
    if held:
        return pb.HostResidency.Held(site=site, all=True)
    return pb.HostResidency.Held(site=site, none=True)


# ---- completions -----------------------------------------------------------------------------


def failure(what: str, completion: pb.CompletionEntry) -> CommandFailed | None:
    """None when the command succeeded."""
    status = completion.status
    if status.sct == 0 and status.sc == 0:
        return None
    lost = tuple(
        LostUnits(part.site, part.copy, _units(part.units)) for part in completion.media_error.lost
    )
    return CommandFailed(what, status.sct, status.sc, status.detail, not status.dnr, lost)


def nothing(_: pb.CompletionEntry) -> None:
    """For commands that answer with their status alone."""


def data_of(completion: pb.CompletionEntry) -> bytes:
    return completion.data


def numbers_of(completion: pb.CompletionEntry) -> U16:
    """The numbers of patterns [blocks]."""
    return np.frombuffer(completion.data, np.dtype("<u2"))


def json_of(completion: pb.CompletionEntry) -> Any:
    return json.loads(completion.data)


def dword0_of(completion: pb.CompletionEntry) -> int:
    return completion.dword0


def event_of(completion: pb.CompletionEntry) -> AsyncEvent:
    told = completion.async_event
    return AsyncEvent(told.type, told.info, told.log_id)


def units_of(completion: pb.CompletionEntry) -> U32:
    return _units(completion.execute.units)


def values_of(completion: pb.CompletionEntry) -> F32:
    """The values of a correction, float32 [rows * hidden]."""
    return np.frombuffer(completion.execute.values, np.dtype("<f4"))


def staged_of(completion: pb.CompletionEntry) -> Staged:
    sites = tuple(_staged_site(site) for site in completion.stage.sites)
    return Staged(sites, timing_of(completion))


def timing_of(completion: pb.CompletionEntry) -> Timing:
    timing = completion.timing
    return Timing(
        submitted_ns=timing.submitted_ns,
        done_ns=timing.done_ns,
        queue_ns=timing.queue_ns,
        program_ns=timing.program_ns,
        nand_ns=timing.nand_ns,
        dram_ns=timing.dram_ns,
        link_ns=timing.link_ns,
        late_ns=timing.late_ns,
    )


def leases_of(completion: pb.CompletionEntry) -> list[int]:
    """What would have to be released if nobody wants the answer any more."""
    return [site.lease for site in completion.stage.sites if site.lease]


def _staged_site(site: pb.StagedSite) -> StagedSite:
    return StagedSite(
        site=site.site,
        predicted=_units(site.predicted) if site.predicted else None,
        units=None if site.all_missing else _units(site.units),
        unit_count=site.unit_count,
        window_offset=site.window_offset,
        length_bytes=site.length_bytes,
        lease=site.lease,
        ready_ns=site.ready_ns,
        units_from_dram=site.units_from_dram,
        nand_page_reads=site.nand_page_reads,
        units_from_copies=site.units_from_copies,
        to_dram=site.to_dram,
        units_no_room=site.units_no_room,
        units_lost=site.units_lost,
    )


def _units(data: bytes) -> npt.NDArray[np.uint32]:
    return np.frombuffer(data, np.dtype("<u4"))
