"""Submission entries to the firmware's commands, and its completions to completion entries.

`command_of` is two tables: which body an opcode goes with, and how that body is read. Any other
opcode is INVALID_OPCODE; another body, or one whose bytes make no array, is INVALID_FIELD.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from csd_device.compute import Origin
from csd_device.errors import CommandError
from csd_device.firmware import commands as fw
from csd_protocol.csd.v1 import csd_pb2 as pb
from csd_protocol.opcodes import AdminOpcode, CommandSet, ComputeOpcode, NvmOpcode
from csd_protocol.status import Status

CID_MAX = 0xFFFF
NAMESPACE = 1

Reader = Callable[[Any], fw.Command]


def command_of(entry: pb.SubmissionEntry) -> fw.Command:
    """Raises CommandError: INVALID_OPCODE, INVALID_FIELD or INVALID_NAMESPACE."""
    known = _READERS.get((entry.set, entry.opcode))
    if known is None:
        raise CommandError(
            Status.INVALID_OPCODE, f"command set {entry.set} has no opcode {entry.opcode:02X}h"
        )
    body, reader = known
    given = entry.WhichOneof("body")
    if given != body:
        raise CommandError(
            Status.INVALID_FIELD,
            f"opcode {entry.opcode:02X}h of command set {entry.set} goes with {body}, "
            f"not {given or 'an empty body'}",
        )
    if entry.set != pb.COMMAND_SET_ADMIN and entry.nsid != NAMESPACE:
        raise CommandError(
            Status.INVALID_NAMESPACE, f"namespace {entry.nsid}; this drive has only {NAMESPACE}"
        )
    return reader(getattr(entry, body))


def _blocks(body: pb.BlockRange) -> fw.BlockRange:
    return fw.BlockRange(body.slba, body.blocks)


def _block_ranges(ranges: Iterable[pb.BlockRange]) -> tuple[fw.BlockRange, ...]:
    return tuple(_blocks(block_range) for block_range in ranges)


def _words(name: str, data: bytes) -> npt.NDArray[np.uint32]:
    if len(data) % 4:
        raise CommandError(
            Status.INVALID_FIELD, f"{name}: {len(data)} bytes are no whole number of 32-bit words"
        )
    return np.frombuffer(data, np.dtype("<u4"))


def _half_words(name: str, data: bytes) -> npt.NDArray[np.uint16]:
    if len(data) % 2:
        raise CommandError(
            Status.INVALID_FIELD, f"{name}: {len(data)} bytes are no whole number of 16-bit words"
        )
    return np.frombuffer(data, np.dtype("<u2"))


def _hidden(data: bytes, rows: int) -> npt.NDArray[np.float32]:
    """[rows, hidden]; no rows is one row."""
    values = _words("hidden", data).view(np.dtype("<f4"))
    if values.size % max(rows, 1):
        raise CommandError(
            Status.INVALID_FIELD, f"hidden: {values.size} values do not make {rows} equal rows"
        )
    return values.reshape(max(rows, 1), -1)


def _target(target: pb.StageTarget) -> fw.Target:
    what = target.WhichOneof("what")
    if what is None:
        raise CommandError(
            Status.INVALID_FIELD, f"site {target.site}: a target names keep, units or all"
        )
    return fw.Target(
        site=target.site,
        what=fw.What(what),
        keep=target.keep if what == "keep" else 1.0,
        units=_words(f"units of site {target.site}", target.units),
        ignore_residency=target.ignore_residency,
        copy=target.copy,
        elsewhere=tuple(
            fw.Elsewhere(part.copy, _words(f"units of site {target.site} elsewhere", part.units))
            for part in target.elsewhere
        ),
        to_dram=target.to_dram,
        first=target.first,
        end=target.end or None,
    )


def _targets(targets: Iterable[pb.StageTarget]) -> tuple[fw.Target, ...]:
    return tuple(_target(target) for target in targets)


def _load_program(body: pb.LoadProgram) -> fw.Command:
    return fw.LoadProgram(
        body.program, body.total_bytes, body.offset_bytes, body.chunk, body.unload
    )


_WANTED = {
    pb.ExecuteProgram.WANTED_UNITS: fw.Wanted.UNITS,
    pb.ExecuteProgram.WANTED_CORRECTION: fw.Wanted.CORRECTION,
}


def _execute_program(body: pb.ExecuteProgram) -> fw.Command:
    if body.wanted not in _WANTED:
        raise CommandError(Status.INVALID_FIELD, f"wanted {body.wanted}; it is 0 or 1")
    return fw.ExecuteProgram(
        program=body.program,
        model=body.model,
        layer=body.layer,
        hidden=_hidden(body.hidden, body.rows),
        keep=body.keep,
        token=body.token,
        wanted=_WANTED[body.wanted],
        units=_words("units", body.units),
        observed=_observed(body.observed),
        origin=_origin(body),
    )


def _observed(observed: Iterable[pb.Observed]) -> tuple[fw.Observed, ...]:
    return tuple(
        fw.Observed(item.site, _words(f"observed of site {item.site}", item.units))
        for item in observed
    )


def _origin(body: pb.ExecuteProgram | pb.PredictAndStage) -> Origin | None:
    if not body.HasField("origin"):
        return None
    return Origin(body.origin.layer, body.origin.behind_attention)


def _experts(body: pb.PredictAndStage) -> fw.TopExperts | None:
    if not body.HasField("experts"):
        return None
    return fw.TopExperts(body.experts.program, body.experts.count)


def _predict_and_stage(body: pb.PredictAndStage) -> fw.Command:
    return fw.PredictAndStage(
        model=body.model,
        program=body.program,
        token=body.token,
        hidden=_hidden(body.hidden, body.rows),
        targets=_targets(body.targets),
        release=tuple(body.release),
        observed=_observed(body.observed),
        origin=_origin(body),
        experts=_experts(body),
        heads=body.heads if body.HasField("heads") else None,
    )


def _held(held: pb.HostResidency.Held) -> fw.SiteResidency:
    what = held.WhichOneof("what")
    if what is None:
        raise CommandError(
            Status.INVALID_FIELD, f"site {held.site}: residency is a bitmap, all or none"
        )
    return fw.SiteResidency(held.site, fw.Held(what), held.bitmap)


def _host_residency(body: pb.HostResidency) -> fw.Command:
    return fw.HostResidency(body.model, tuple(_held(held) for held in body.held))


_ADMIN, _NVM, _COMPUTE = CommandSet.ADMIN, CommandSet.NVM, CommandSet.COMPUTE

_READERS: dict[tuple[int, int], tuple[str, Reader]] = {
    (_ADMIN, AdminOpcode.IDENTIFY): ("identify", lambda body: fw.Identify(body.cns)),
    (_ADMIN, AdminOpcode.GET_LOG_PAGE): (
        "get_log_page",
        lambda body: fw.GetLogPage(body.log_id, body.offset_bytes, body.length_bytes),
    ),
    (_ADMIN, AdminOpcode.ABORT): ("abort", lambda body: fw.Abort(body.cid)),
    (_ADMIN, AdminOpcode.SET_FEATURES): (
        "features",
        lambda body: fw.SetFeatures(body.feature_id, body.value, body.data),
    ),
    (_ADMIN, AdminOpcode.GET_FEATURES): (
        "features",
        lambda body: fw.GetFeatures(body.feature_id),
    ),
    (_ADMIN, AdminOpcode.ASYNC_EVENT): ("async_event", lambda _: fw.AsyncEvent()),
    (_ADMIN, AdminOpcode.KEEP_ALIVE): ("keep_alive", lambda _: fw.KeepAlive()),
    (_ADMIN, AdminOpcode.FORMAT): ("format", lambda body: fw.Format(body.lba_format)),
    (_ADMIN, AdminOpcode.LOAD_PROGRAM): ("load_program", _load_program),
    (_ADMIN, AdminOpcode.PROGRAM_ACTIVATION): (
        "program_activation",
        lambda body: fw.ProgramActivation(body.program, body.active),
    ),
    (_ADMIN, AdminOpcode.MEMORY_RANGE_SET): (
        "memory_range_set",
        lambda body: fw.MemoryRangeSet(body.window_bytes, body.unit_cache_bytes),
    ),
    (_NVM, NvmOpcode.FLUSH): ("flush", lambda _: fw.Flush()),
    (_NVM, NvmOpcode.WRITE): ("write", lambda body: fw.Write(body.slba, body.data, body.fua)),
    (_NVM, NvmOpcode.READ): ("blocks", lambda body: fw.Read(_blocks(body))),
    (_NVM, NvmOpcode.COMPARE): ("compare", lambda body: fw.Compare(body.slba, body.data)),
    (_NVM, NvmOpcode.WRITE_ZEROES): ("blocks", lambda body: fw.WriteZeroes(_blocks(body))),
    (_NVM, NvmOpcode.DATASET_MANAGEMENT): (
        "dataset_management",
        lambda body: fw.DatasetManagement(_block_ranges(body.ranges)),
    ),
    (_NVM, NvmOpcode.VERIFY): ("blocks", lambda body: fw.Verify(_blocks(body))),
    (_NVM, NvmOpcode.COPY): (
        "copy",
        lambda body: fw.Copy(body.dst_slba, _block_ranges(body.sources)),
    ),
    (_NVM, NvmOpcode.DEFINE_PATTERNS): (
        "define_patterns",
        lambda body: fw.DefinePatterns(body.data),
    ),
    (_NVM, NvmOpcode.WRITE_PATTERNS): (
        "write_patterns",
        lambda body: fw.WritePatterns(body.slba, _half_words("patterns", body.patterns)),
    ),
    (_COMPUTE, ComputeOpcode.EXECUTE_PROGRAM): ("execute_program", _execute_program),
    (_COMPUTE, ComputeOpcode.PREDICT_AND_STAGE): ("predict_and_stage", _predict_and_stage),
    (_COMPUTE, ComputeOpcode.STAGE): (
        "stage",
        lambda body: fw.Stage(body.model, _targets(body.targets), tuple(body.release)),
    ),
    (_COMPUTE, ComputeOpcode.RELEASE): ("release", lambda body: fw.Release(tuple(body.leases))),
    (_COMPUTE, ComputeOpcode.HOST_RESIDENCY): ("host_residency", _host_residency),
}


# ---- completions -----------------------------------------------------------------------------


def entry_of(completion: fw.Completion, sq_head: int, late_ns: int) -> pb.CompletionEntry:
    """The entry to post. `late_ns`: how long after its time, wall time only."""
    entry = pb.CompletionEntry(
        cid=completion.cid, sq_head=sq_head, timing=_timing(completion.timing, late_ns)
    )
    if completion.status is not Status.SUCCESS:
        set_status(entry, completion.status, completion.detail, completion.do_not_retry)
    if completion.result is not None:
        _RESULTS[type(completion.result)](entry, completion.result)
    return entry


def refusal(cid: int, status: Status, detail: str) -> pb.CompletionEntry:
    """The completion of an entry that never became a command."""
    entry = pb.CompletionEntry(cid=cid)
    set_status(entry, status, detail, not status.value.retryable)
    return entry


def set_status(entry: pb.CompletionEntry, status: Status, detail: str, dnr: bool) -> None:
    entry.status.sct, entry.status.sc = status.sct, status.sc
    entry.status.detail, entry.status.dnr = detail, dnr


def _timing(timing: fw.Timing, late_ns: int) -> pb.Timing:
    return pb.Timing(
        submitted_ns=timing.submitted_ns,
        done_ns=timing.done_ns,
        queue_ns=timing.queue_ns,
        program_ns=timing.program_ns,
        nand_ns=timing.nand_ns,
        dram_ns=timing.dram_ns,
        link_ns=timing.link_ns,
        late_ns=late_ns,
    )


def _put_stage(entry: pb.CompletionEntry, result: fw.StageResult) -> None:
    entry.stage.sites.extend(_staged_site(site) for site in result.sites)


def _staged_site(site: fw.StagedSite) -> pb.StagedSite:
    return pb.StagedSite(
        site=site.site,
        predicted=_word_bytes(site.predicted),
        units=_word_bytes(site.units),
        all_missing=site.all_missing,
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


def _word_bytes(words: npt.NDArray[np.uint32]) -> bytes:
    return words.astype("<u4", copy=False).tobytes()


def _put_media_error(entry: pb.CompletionEntry, result: fw.MediaError) -> None:
    entry.media_error.lost.extend(
        pb.LostUnits(site=lost.site, copy=lost.copy, units=_word_bytes(lost.units))
        for lost in result.lost
    )


def _put_execute(entry: pb.CompletionEntry, result: fw.ExecuteResult) -> None:
    entry.execute.units = _word_bytes(result.units)
    if result.values is not None:
        entry.execute.values = result.values.astype("<f4", copy=False).tobytes()


def _put_event(entry: pb.CompletionEntry, result: fw.AsyncEventResult) -> None:
    entry.async_event.type = result.type
    entry.async_event.info = result.info
    entry.async_event.log_id = result.log_id


def _put_data(entry: pb.CompletionEntry, result: fw.Data) -> None:
    entry.data = result.data


def _put_dword0(entry: pb.CompletionEntry, result: fw.Dword0) -> None:
    entry.dword0 = result.value


_RESULTS: dict[type, Callable[[pb.CompletionEntry, Any], None]] = {
    fw.StageResult: _put_stage,
    fw.MediaError: _put_media_error,
    fw.ExecuteResult: _put_execute,
    fw.AsyncEventResult: _put_event,
    fw.Data: _put_data,
    fw.Dword0: _put_dword0,
}
