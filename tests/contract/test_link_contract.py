"""What every Link does, over gRPC to a daemon and straight into a controller of this process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from csd_device.clock import TimeMode, VirtualClock
from csd_device.config import load_config
from csd_device.drive import Drive as DeviceDrive
from csd_device.service.endpoint import Endpoint
from csd_device.service.rehearsal import FFN, HIDDEN, MODEL, PROGRAM, UNITS, micro_model
from csd_protocol.address import parse_address
from csd_protocol.csd.v1 import csd_pb2 as pb
from csd_protocol.opcodes import Cns
from csd_protocol.packed import BLOCK_BYTES, MODELS_OFFSET_BYTES
from csd_protocol.status import Status
from host_client.driver import CommandFailed, Drive, DriveLost, StageTarget, entries
from host_client.driver.embedded import Daemon
from host_client.driver.entries import Command
from host_client.driver.link import GrpcLink, InProcessLink, Link
from host_client.driver.queue_pair import QueuePair

NewLink = Callable[[], Link]
SCRATCH = 64 << 20  # bytes from here on are the tests' own
UNIT_BYTES = 3 * HIDDEN * 2
IMAGE, SHADOW = micro_model()
UNITS_AT = MODELS_OFFSET_BYTES + 2 * BLOCK_BYTES
FFN_UNITS = np.frombuffer(IMAGE, np.uint8)[UNITS_AT : UNITS_AT + UNITS * UNIT_BYTES].reshape(
    UNITS, UNIT_BYTES
)


def in_process(folder: Path) -> Iterator[NewLink]:
    drive = DeviceDrive.open(
        load_config("tiny"),
        folder / "drive.csd",
        clock=VirtualClock(),
        time_mode=TimeMode.VIRTUAL,
        window_path=folder / "window",
    )
    link = InProcessLink(Endpoint(drive))
    yield lambda: link
    link.close()
    drive.close()


def over_grpc(folder: Path) -> Iterator[NewLink]:
    daemon = Daemon.start(folder / "drive.csd", "tiny", "virtual", start_timeout_s=120.0)
    yield lambda: GrpcLink(parse_address(daemon.address))
    daemon.stop()


@pytest.fixture(scope="module", params=[over_grpc, in_process], ids=["grpc", "in-process"])
def new_link(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NewLink]:
    """Links to one drive that holds the micro model and its program."""
    for make in request.param(tmp_path_factory.mktemp("drive")):
        drive = Drive(make())
        drive.write(0, IMAGE)
        drive.flush()
        drive.load_program(PROGRAM, SHADOW)
        drive._queue.close()
        yield make


@pytest.fixture
def drive(new_link: NewLink) -> Iterator[Drive]:
    connected = Drive(new_link())
    yield connected
    connected._queue.close()


def window_bytes(drive: Drive, offset: int, length: int) -> np.ndarray:
    with Path(drive.window_path).open("rb") as window:
        window.seek(offset)
        return np.frombuffer(window.read(length), np.uint8)


def leases(drive: Drive) -> int:
    return drive.identify(Cns.WINDOW)["leases"]


def test_the_drive_describes_itself(drive: Drive) -> None:
    tiny = load_config("tiny")
    assert drive.block_bytes == BLOCK_BYTES
    assert drive.capacity_bytes == tiny.capacity_bytes
    assert drive.transfer_bytes_max == tiny.queues.mdts_bytes
    assert drive.queue_depth == tiny.queues.max_depth - 1
    assert Path(drive.window_path).stat().st_size == drive.window_bytes == tiny.dram.window_bytes
    assert drive.alive()


def test_bytes_come_back_whatever_the_range(drive: Drive) -> None:
    data = np.random.default_rng(1).bytes(3 * drive.transfer_bytes_max + BLOCK_BYTES)
    drive.write(SCRATCH, data)
    drive.flush()
    assert drive.read(SCRATCH, len(data)) == data
    assert drive.read(SCRATCH + 5, 10_000) == data[5:10_005]
    assert drive.read(SCRATCH, 0) == b""
    drive.deallocate(SCRATCH, len(data))
    assert not any(drive.read(SCRATCH, len(data)))


def test_writes_are_whole_blocks(drive: Drive) -> None:
    for offset, data in ((1, bytes(BLOCK_BYTES)), (0, bytes(100))):
        with pytest.raises(ValueError, match="whole blocks of 4096 bytes"):
            drive.write(offset, data)


def test_a_failure_carries_status_and_reason(drive: Drive) -> None:
    with pytest.raises(CommandFailed, match=r"LBA Out of Range \(0/80h\)") as error:
        drive.read(drive.capacity_bytes, BLOCK_BYTES)
    assert error.value.status is Status.LBA_OUT_OF_RANGE
    assert not error.value.retryable


def test_faults_are_set_seen_and_cleared(drive: Drive) -> None:
    data = np.random.default_rng(5).bytes(64 * BLOCK_BYTES)
    drive.write(SCRATCH, data)
    drive.set_faults("bit_errors", {"rate": 1e-2}, seed=3)
    drive.set_faults("unreadable", {"lbas": [[SCRATCH // BLOCK_BYTES, 2]]})
    with pytest.raises(CommandFailed, match=f"LBAs {SCRATCH // BLOCK_BYTES}, ") as error:
        drive.read(SCRATCH, len(data))
    assert error.value.status is Status.UNRECOVERED_READ
    drive.set_faults("unreadable", None)
    assert drive.read(SCRATCH, len(data)) == data
    told = drive.faults()
    assert (told["seed"], told["bit_errors"]["rate"], told["unreadable"]) == (3, 1e-2, None)
    assert told["counters"]["retried_sectors"] > 0
    with pytest.raises(CommandFailed, match=r"bit_errors\.rate: .*less than or equal to 1"):
        drive.set_faults("bit_errors", {"rate": 7})
    drive.clear_faults()
    assert drive.faults()["bit_errors"] is None


def test_staged_units_lie_in_the_window_packed(drive: Drive) -> None:
    wanted = np.array([2, 3, 40], np.uint32)
    staged = drive.stage(MODEL, [StageTarget(FFN, units=wanted)]).result()
    (site,) = staged.sites
    assert site.units is not None
    assert site.units.tolist() == wanted.tolist()
    assert site.length_bytes == 3 * UNIT_BYTES
    lying = window_bytes(drive, site.window_offset, site.length_bytes)
    assert np.array_equal(lying.reshape(3, UNIT_BYTES), FFN_UNITS[wanted])
    assert leases(drive) == 1
    drive.release(staged.leases)
    assert leases(drive) == 0
    assert drive.release_errors == 0


def test_units_brought_to_dram_are_there_for_the_next_command(drive: Drive) -> None:
    wanted = np.array([5, 6, 50], np.uint32)
    drive.write(UNITS_AT, IMAGE[UNITS_AT : UNITS_AT + BLOCK_BYTES])  # nothing is in DRAM now
    (brought,) = drive.stage(MODEL, [StageTarget(FFN, units=wanted, to_dram=True)]).result().sites
    assert brought.to_dram
    assert brought.units is not None
    assert brought.units.tolist() == wanted.tolist()
    assert (brought.units_from_dram, brought.lease, brought.length_bytes) == (0, 0, 0)
    assert (brought.units_no_room, brought.units_lost) == (0, 0)
    assert leases(drive) == 0
    hidden = np.ones((1, HIDDEN), np.float32)
    targets = [StageTarget(FFN, units=wanted), StageTarget(FFN, keep=0.25, to_dram=True)]
    staged, more = drive.predict_and_stage(MODEL, PROGRAM, 0, hidden, targets).result().sites
    assert (staged.units_from_dram, staged.nand_page_reads) == (3, 0)
    lying = window_bytes(drive, staged.window_offset, staged.length_bytes)
    assert np.array_equal(lying.reshape(3, UNIT_BYTES), FFN_UNITS[wanted])
    assert more.predicted is not None
    assert more.unit_count == more.predicted.size == UNITS // 4


def test_a_program_predicts_and_what_the_host_holds_is_left_out(drive: Drive) -> None:
    hidden = np.random.default_rng(2).standard_normal((2, HIDDEN)).astype(np.float32)
    target = [StageTarget(FFN, keep=0.25)]
    (first,) = drive.predict_and_stage(MODEL, PROGRAM, 0, hidden, target).result().sites
    assert first.predicted is not None
    assert first.predicted.size == UNITS // 4
    assert np.array_equal(
        first.predicted, drive.execute_program(PROGRAM, MODEL, 0, hidden, 0.25).result()
    )
    held = np.zeros(UNITS, np.bool_)
    held[first.predicted[:10]] = True
    drive.set_residency(MODEL, {FFN: held})
    (second,) = drive.predict_and_stage(MODEL, PROGRAM, 1, hidden, target).result().sites
    assert second.units is not None
    assert second.units.tolist() == first.predicted[10:].tolist()


def test_what_a_target_says_is_held_is_left_out_of_it_alone(drive: Drive) -> None:
    hidden = np.random.default_rng(2).standard_normal((2, HIDDEN)).astype(np.float32)
    plain = StageTarget(FFN, keep=0.25)
    (first,) = drive.predict_and_stage(MODEL, PROGRAM, 0, hidden, [plain]).result().sites
    assert first.predicted is not None
    held = np.zeros(UNITS, np.bool_)
    held[first.predicted[:10]] = True
    target = StageTarget(FFN, keep=0.25, held=held)
    (second,) = drive.predict_and_stage(MODEL, PROGRAM, 1, hidden, [target]).result().sites
    assert second.units is not None
    assert second.predicted is not None
    assert second.predicted.tolist() == first.predicted.tolist()
    assert second.units.tolist() == first.predicted[10:].tolist()
    lying = window_bytes(drive, second.window_offset, second.length_bytes)
    assert np.array_equal(lying.reshape(-1, UNIT_BYTES), FFN_UNITS[second.units])
    (third,) = drive.predict_and_stage(MODEL, PROGRAM, 2, hidden, [plain]).result().sites
    assert third.unit_count == first.unit_count
    for length in (UNITS - 8, UNITS + 8):
        wrong = StageTarget(FFN, keep=0.25, held=np.zeros(length, np.bool_))
        with pytest.raises(CommandFailed, match=r"bitmap of .* bytes for") as error:
            drive.predict_and_stage(MODEL, PROGRAM, 3, hidden, [wrong]).result()
        assert error.value.status is Status.INVALID_FIELD


def test_all_units_and_none(drive: Drive) -> None:
    (everything,) = drive.stage(MODEL, [StageTarget(FFN, all=True)]).result().sites
    assert everything.units is None
    assert everything.unit_count == UNITS
    drive.set_residency(MODEL, {FFN: True})
    (nothing,) = drive.stage(MODEL, [StageTarget(FFN, all=True)]).result().sites
    assert (nothing.unit_count, nothing.lease) == (0, 0)
    drive.set_residency(MODEL, {FFN: False})
    (again,) = drive.stage(MODEL, [StageTarget(FFN, all=True)]).result().sites
    assert again.unit_count == UNITS


def test_leases_come_back_with_the_queue_pair(drive: Drive, new_link: NewLink) -> None:
    other = Drive(new_link())
    other.stage(MODEL, [StageTarget(FFN, all=True)]).result()
    assert leases(drive) == 1
    other._queue.close()
    assert leases(drive) == 0


def test_reconnecting_says_the_residency_again(drive: Drive) -> None:
    drive.set_residency(MODEL, {FFN: True})
    drive.reconnect()
    (site,) = drive.stage(MODEL, [StageTarget(FFN, all=True)]).result().sites
    assert site.unit_count == 0


def test_a_damaged_unit_is_never_delivered(drive: Drive) -> None:
    damaged = bytearray(IMAGE[UNITS_AT : UNITS_AT + BLOCK_BYTES])
    damaged[7 * UNIT_BYTES + 11] ^= 0x10
    drive.write(UNITS_AT, damaged)
    with pytest.raises(CommandFailed, match=r"\(2/82h\).*unit 7") as error:
        drive.stage(MODEL, [StageTarget(FFN, all=True)]).result()
    assert error.value.status is Status.GUARD_CHECK
    assert leases(drive) == 0
    drive.write(UNITS_AT, IMAGE[UNITS_AT : UNITS_AT + BLOCK_BYTES])
    drive.stage(MODEL, [StageTarget(FFN, all=True)]).result()


def test_corrections_of_two_halves_add_up(drive: Drive) -> None:
    inputs = np.random.default_rng(4).standard_normal((2, HIDDEN), np.float32)
    even, odd = np.arange(0, UNITS, 2, dtype=np.uint32), np.arange(1, UNITS, 2, dtype=np.uint32)
    nothing, everything = np.empty(0, np.uint32), np.arange(UNITS, dtype=np.uint32)
    sums = [
        drive.correct(PROGRAM, MODEL, 0, inputs, computed).result()
        for computed in (even, odd, nothing, everything)
    ]
    assert all(values.shape == inputs.shape for values in sums)
    np.testing.assert_allclose(sums[0] + sums[1], sums[2], rtol=1e-4, atol=1e-3)
    assert np.abs(sums[2]).max() > 1
    assert not sums[3].any()


def test_programs_are_listed_and_unloaded(drive: Drive) -> None:
    drive.load_program(9, SHADOW, activate=False)
    listed = {program["program"]: program for program in drive.programs()}
    assert listed[9]["kind"] == "shadow"
    assert not listed[9]["active"]
    with pytest.raises(CommandFailed) as error:
        drive.execute_program(9, MODEL, 0, np.ones((1, HIDDEN), np.float32), 0.5).result()
    assert error.value.status is Status.PROGRAM_NOT_ACTIVATED
    drive.unload_program(9)
    assert 9 not in {program["program"] for program in drive.programs()}


@pytest.mark.parametrize(
    "entry, status",
    [
        (pb.SubmissionEntry(opcode=0xEE), Status.INVALID_OPCODE),
        (pb.SubmissionEntry(opcode=0x06, flush=pb.Flush()), Status.INVALID_FIELD),
        (
            pb.SubmissionEntry(set=pb.COMMAND_SET_NVM, flush=pb.Flush(), nsid=2),
            Status.INVALID_NAMESPACE,
        ),
        (entries.connect("", "", 0).entry, Status.SEQUENCE_ERROR),
    ],
    ids=["opcode", "body", "namespace", "connected already"],
)
def test_what_makes_no_command_is_refused_and_the_queue_goes_on(
    drive: Drive, entry: pb.SubmissionEntry, status: Status
) -> None:
    with pytest.raises(CommandFailed) as error:
        drive._queue.submit(Command("odd entry", entry), entries.nothing).result()
    assert error.value.status is status
    assert drive.alive()


def test_another_protocol_version_is_refused(
    new_link: NewLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "PROTOCOL_MAJOR", 99)
    with pytest.raises(CommandFailed, match=r"the host speaks protocol 99\.0") as error:
        QueuePair(new_link(), "host", "id")
    assert error.value.status is Status.PROTOCOL_VERSION


def test_the_first_entry_must_be_connect(
    new_link: NewLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "connect", lambda *_: entries.keep_alive())
    with pytest.raises(CommandFailed, match="first entry of a stream is Connect"):
        QueuePair(new_link(), "host", "id")


def test_nothing_can_be_submitted_after_the_end(new_link: NewLink) -> None:
    drive = Drive(new_link())
    drive._queue.close()
    with pytest.raises(DriveLost, match="closed by this host"):
        drive.flush()
    assert not drive.alive()


def test_a_drive_in_wall_time_needs_its_daemon() -> None:
    class WallEndpoint:
        holds_completions = True

    with pytest.raises(ValueError, match="wall time needs its daemon"):
        InProcessLink(WallEndpoint())  # type: ignore[arg-type]
