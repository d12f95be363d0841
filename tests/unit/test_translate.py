"""Submission entries to commands and completions to entries, one of each."""

from typing import Any

import numpy as np
import pytest

from csd_device.errors import CommandError
from csd_device.firmware import commands as fw
from csd_device.service import translate
from csd_protocol.csd.v1 import csd_pb2 as pb
from csd_protocol.opcodes import AdminOpcode, CommandSet, ComputeOpcode, NvmOpcode
from csd_protocol.status import Status
from host_client.driver import Origin, StageTarget, Told, TopExperts, entries

HIDDEN = np.arange(6, dtype=np.float32).reshape(2, 3)
UNITS = np.array([3, 70_000], np.uint32)


def nvm(opcode: NvmOpcode, **body) -> pb.SubmissionEntry:
    return pb.SubmissionEntry(set=pb.COMMAND_SET_NVM, opcode=opcode, nsid=1, **body)


def admin(opcode: AdminOpcode, **body) -> pb.SubmissionEntry:
    return pb.SubmissionEntry(opcode=opcode, **body)


BLOCKS = pb.BlockRange(slba=5, blocks=2)
CASES = [
    (entries.identify(0xC0).entry, fw.Identify(0xC0)),
    (entries.get_log_page(2).entry, fw.GetLogPage(2)),
    (entries.abort(7).entry, fw.Abort(7)),
    (
        admin(AdminOpcode.SET_FEATURES, features=pb.Features(feature_id=6, value=1)),
        fw.SetFeatures(6, 1),
    ),
    (admin(AdminOpcode.GET_FEATURES, features=pb.Features(feature_id=6)), fw.GetFeatures(6)),
    (admin(AdminOpcode.ASYNC_EVENT, async_event=pb.AsyncEvent()), fw.AsyncEvent()),
    (entries.keep_alive().entry, fw.KeepAlive()),
    (admin(AdminOpcode.FORMAT, format=pb.Format(lba_format=0)), fw.Format(0)),
    (entries.load_program(3, 9, 4, b"chunk").entry, fw.LoadProgram(3, 9, 4, b"chunk")),
    (entries.unload_program(3).entry, fw.LoadProgram(3, 0, 0, b"", unload=True)),
    (entries.activate_program(3, True).entry, fw.ProgramActivation(3, True)),
    (
        admin(
            AdminOpcode.MEMORY_RANGE_SET,
            memory_range_set=pb.MemoryRangeSet(window_bytes=1, unit_cache_bytes=2),
        ),
        fw.MemoryRangeSet(1, 2),
    ),
    (entries.flush().entry, fw.Flush()),
    (entries.write(5, b"data", True).entry, fw.Write(5, b"data", True)),
    (entries.read(5, 2).entry, fw.Read(fw.BlockRange(5, 2))),
    (
        nvm(NvmOpcode.DEFINE_PATTERNS, define_patterns=pb.DefinePatterns(data=b"abc")),
        fw.DefinePatterns(b"abc"),
    ),
    (nvm(NvmOpcode.WRITE_ZEROES, blocks=BLOCKS), fw.WriteZeroes(fw.BlockRange(5, 2))),
    (nvm(NvmOpcode.VERIFY, blocks=BLOCKS), fw.Verify(fw.BlockRange(5, 2))),
    (nvm(NvmOpcode.COMPARE, compare=pb.Compare(slba=5, data=b"x")), fw.Compare(5, b"x")),
    (entries.deallocate(5, 2).entry, fw.DatasetManagement((fw.BlockRange(5, 2),))),
    (
        nvm(NvmOpcode.COPY, copy=pb.Copy(dst_slba=1, sources=[BLOCKS])),
        fw.Copy(1, (fw.BlockRange(5, 2),)),
    ),
    (entries.release([4, 5]).entry, fw.Release((4, 5))),
    (
        entries.host_residency(1, {0: np.array([1, 0, 1], np.bool_), 1: True, 2: False}).entry,
        fw.HostResidency(
            1,
            (
                fw.SiteResidency(0, fw.Held.BITMAP, b"\x05"),
                fw.SiteResidency(1, fw.Held.ALL),
                fw.SiteResidency(2, fw.Held.NONE),
            ),
        ),
    ),
]


@pytest.mark.parametrize("entry, command", CASES, ids=lambda value: type(value).__name__)
def test_each_command_arrives_as_it_was_sent(entry: pb.SubmissionEntry, command: object) -> None:
    assert translate.command_of(entry) == command


def test_a_prediction_arrives_with_its_arrays() -> None:
    targets = [StageTarget(1, keep=0.5), StageTarget(2, units=UNITS), StageTarget(3, all=True)]
    command = translate.command_of(entries.predict_and_stage(9, 4, 17, HIDDEN, targets).entry)
    assert isinstance(command, fw.PredictAndStage)
    assert (command.model, command.program, command.token) == (9, 4, 17)
    assert np.array_equal(command.hidden, HIDDEN)
    assert [target.what for target in command.targets] == [
        fw.What.KEEP,
        fw.What.UNITS,
        fw.What.ALL,
    ]
    assert command.targets[0].keep == 0.5
    assert command.targets[1].units.tolist() == UNITS.tolist()


def test_a_target_of_all_may_be_a_range() -> None:
    targets = [StageTarget(3, all=True, first=5, end=9), StageTarget(4, all=True)]
    command = translate.command_of(entries.stage(9, targets).entry)
    assert isinstance(command, fw.Stage)
    assert [(target.first, target.end) for target in command.targets] == [(5, 9), (0, None)]


@pytest.mark.parametrize(
    "settings", [{"first": 3}, {"keep": 0.5, "end": 4}, {"all": True, "end": 0}]
)
def test_a_range_is_of_all_units_and_not_empty(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="site 3"):
        StageTarget(3, **settings)


def test_a_mixtures_targets_may_be_those_of_the_top_experts() -> None:
    told = Told(experts=TopExperts(5, 2))
    entry = entries.predict_and_stage(9, 4, 17, HIDDEN, [StageTarget(3, all=True)], told=told).entry
    command = translate.command_of(entry)
    assert isinstance(command, fw.PredictAndStage)
    assert command.experts == fw.TopExperts(5, 2)
    plain = translate.command_of(entries.predict_and_stage(9, 4, 17, HIDDEN, []).entry)
    assert isinstance(plain, fw.PredictAndStage)
    assert plain.experts is None


def test_a_target_says_which_copy_its_units_come_from() -> None:
    target = StageTarget(5, all=True, copy=1, elsewhere=((0, UNITS), (2, UNITS[:1])))
    command = translate.command_of(entries.stage(9, [target]).entry)
    assert isinstance(command, fw.Stage)
    (arrived,) = command.targets
    assert arrived.copy == 1
    assert [(part.copy, part.units.tolist()) for part in arrived.elsewhere] == [
        (0, UNITS.tolist()),
        (2, UNITS[:1].tolist()),
    ]


def test_what_is_lost_comes_back_with_the_failure() -> None:
    lost = fw.MediaError((fw.LostUnits(4, 1, UNITS), fw.LostUnits(7, 0, UNITS[:1])))
    made = fw.Completion(5, Status.UNRECOVERED_READ, fw.Timing(), lost, "gone", True)
    entry = pb.CompletionEntry.FromString(translate.entry_of(made, 0, 0).SerializeToString())
    failed = entries.failure("STAGE", entry)
    assert failed is not None
    assert failed.is_media_error
    assert not failed.retryable
    assert [(part.site, part.copy, part.units.tolist()) for part in failed.lost] == [
        (4, 1, UNITS.tolist()),
        (7, 0, UNITS[:1].tolist()),
    ]


def test_what_a_program_is_told_arrives() -> None:
    told = Told(Origin(7, behind_attention=True), {3: UNITS})
    for entry in (
        entries.predict_and_stage(9, 4, 17, HIDDEN, [], told=told).entry,
        entries.execute_program(4, 9, 2, HIDDEN, 0.5, told, token=17).entry,
    ):
        command = translate.command_of(entry)
        assert command.token == 17
        assert (command.origin.layer, command.origin.behind_attention) == (7, True)
        assert [(seen.site, seen.units.tolist()) for seen in command.observed] == [
            (3, UNITS.tolist())
        ]
    assert (
        translate.command_of(entries.predict_and_stage(9, 4, 17, HIDDEN, []).entry).origin is None
    )


def test_a_correction_arrives_and_its_values_come_back() -> None:
    command = translate.command_of(entries.correct(4, 9, 2, HIDDEN, UNITS).entry)
    assert isinstance(command, fw.ExecuteProgram)
    assert (command.program, command.model, command.layer) == (4, 9, 2)
    assert command.wanted is fw.Wanted.CORRECTION
    assert command.units.tolist() == UNITS.tolist()
    result = fw.ExecuteResult(np.empty(0, np.uint32), HIDDEN)
    done = translate.entry_of(fw.Completion(1, Status.SUCCESS, fw.Timing(), result), 1, 0)
    assert entries.values_of(done).tolist() == HIDDEN.reshape(-1).tolist()


def test_one_row_may_come_without_its_dimension() -> None:
    command = translate.command_of(entries.execute_program(1, 2, 3, HIDDEN[0], 0.5).entry)
    assert isinstance(command, fw.ExecuteProgram)
    assert command.hidden.shape == (1, 3)


@pytest.mark.parametrize(
    "entry, status, detail",
    [
        (pb.SubmissionEntry(opcode=0xAB), Status.INVALID_OPCODE, "no opcode ABh"),
        (
            admin(AdminOpcode.ABORT, flush=pb.Flush()),
            Status.INVALID_FIELD,
            "opcode 08h of command set 0 goes with abort, not flush",
        ),
        (admin(AdminOpcode.ABORT), Status.INVALID_FIELD, "not an empty body"),
        (
            pb.SubmissionEntry(set=pb.COMMAND_SET_NVM, flush=pb.Flush()),
            Status.INVALID_NAMESPACE,
            "namespace 0",
        ),
        (
            entries._compute("", ComputeOpcode.STAGE, stage=pb.Stage(targets=[{}])).entry,
            Status.INVALID_FIELD,
            "names keep, units or all",
        ),
        (
            entries._compute(
                "", ComputeOpcode.STAGE, stage=pb.Stage(targets=[{"units": b"12345"}])
            ).entry,
            Status.INVALID_FIELD,
            "5 bytes are no whole number",
        ),
        (
            entries._compute(
                "",
                ComputeOpcode.EXECUTE_PROGRAM,
                execute_program=pb.ExecuteProgram(hidden=bytes(20), rows=2),
            ).entry,
            Status.INVALID_FIELD,
            "5 values do not make 2 equal rows",
        ),
        (
            entries._compute(
                "",
                ComputeOpcode.HOST_RESIDENCY,
                host_residency=pb.HostResidency(held=[{"site": 3}]),
            ).entry,
            Status.INVALID_FIELD,
            "site 3: residency is",
        ),
    ],
)
def test_what_makes_no_command(entry: pb.SubmissionEntry, status: Status, detail: str) -> None:
    with pytest.raises(CommandError, match=detail) as error:
        translate.command_of(entry)
    assert error.value.status is status


def test_every_opcode_is_known() -> None:
    known = set(translate._READERS)
    wanted = {
        (command_set, opcode)
        for command_set, opcodes in (
            (CommandSet.ADMIN, AdminOpcode),
            (CommandSet.NVM, NvmOpcode),
            (CommandSet.COMPUTE, ComputeOpcode),
        )
        for opcode in opcodes
    }
    assert wanted - known == {(CommandSet.ADMIN, AdminOpcode.CONNECT)}  # the session's own


def test_a_staging_result_comes_back_as_it_was_made() -> None:
    timing = fw.Timing(1, 2, 3, 4, 5, 6, 7)
    sites = (
        fw.StagedSite(1, UNITS, UNITS[:1], False, 1, 64, 256, 8, 9, 10, 11),
        fw.StagedSite(2, UNITS[:0], UNITS[:0], True, 40, 320, 512, 12, 13, 14, 15),
    )
    made = fw.Completion(5, Status.SUCCESS, timing, fw.StageResult(sites))
    entry = pb.CompletionEntry.FromString(translate.entry_of(made, 3, 99).SerializeToString())
    assert (entry.cid, entry.sq_head) == (5, 3)
    assert entries.failure("", entry) is None
    staged = entries.staged_of(entry)
    assert staged.timing.late_ns == 99
    assert (staged.timing.submitted_ns, staged.timing.link_ns) == (1, 7)
    first, second = staged.sites
    assert first.predicted is not None
    assert first.units is not None
    assert (first.predicted.tolist(), first.units.tolist()) == (UNITS.tolist(), [3])
    assert (second.predicted, second.units, second.unit_count) == (None, None, 40)
    assert staged.leases == (8, 12)


@pytest.mark.parametrize(
    "result, field, value",
    [
        (fw.Data(b"d"), "data", b"d"),
        (fw.Dword0(7), "dword0", 7),
        (fw.ExecuteResult(UNITS), "execute", pb.ExecuteResult(units=UNITS.tobytes())),
        (
            fw.AsyncEventResult(1, 2, 3),
            "async_event",
            pb.AsyncEventResult(type=1, info=2, log_id=3),
        ),
    ],
)
def test_other_results(result: fw.Result, field: str, value: object) -> None:
    entry = translate.entry_of(fw.Completion(1, Status.SUCCESS, fw.Timing(), result), 0, 0)
    assert entry.WhichOneof("result") == field
    assert getattr(entry, field) == value


def test_a_failure_keeps_reason_and_do_not_retry() -> None:
    made = fw.Completion(1, Status.GUARD_CHECK, fw.Timing(), detail="unit 7", do_not_retry=True)
    failed = entries.failure("STAGE", translate.entry_of(made, 0, 0))
    assert failed is not None
    assert (failed.status, failed.detail, failed.retryable) == (Status.GUARD_CHECK, "unit 7", False)
