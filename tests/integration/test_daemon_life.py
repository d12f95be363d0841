"""A daemon's life as a process: how it starts, stops, is killed, and what hosts see of that.

These tests end daemons, so they start their own and never touch a shared one.
"""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from program_samples import SAMPLES

from csd_protocol.csd.v1 import csd_pb2 as pb
from csd_protocol.csd.v1.csd_pb2_grpc import ControllerStub
from csd_protocol.opcodes import AdminOpcode, Cns, LogPage
from csd_protocol.program_file import ProgramKind
from csd_protocol.status import Status
from host_client.driver import Drive, DriveLost, DriveUnavailable, StageTarget, entries
from host_client.driver.embedded import Daemon

if "CSD_DRIVE" in os.environ:
    pytest.skip("the daemon is elsewhere and not ours to end", allow_module_level=True)

from csd_device.service.rehearsal import FFN, HIDDEN, MODEL, PROGRAM, UNITS, micro_model

DEADLINE_S = 60.0
IMAGE, SHADOW = micro_model()


def await_true(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        threading.Event().wait(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def media(tmp_path: Path) -> Path:
    return tmp_path / "drive.csd"


@pytest.fixture(scope="module")
def shared_media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared") / "drive.csd"


@pytest.fixture(scope="module")
def daemon(shared_media: Path) -> Iterator[Daemon]:
    """For tests that leave it running."""
    started = Daemon.start(shared_media, "tiny", "off", DEADLINE_S)
    yield started
    started.stop()


@pytest.fixture
def slow_daemon(media: Path, tmp_path: Path) -> Iterator[Daemon]:
    """Wall time, and a page read of an hour: what reads NAND stays pending."""
    preset = Path(sys.modules["csd_device"].__path__[0]) / "presets/tiny.toml"
    slow = tmp_path / "slow.toml"
    slow.write_text(preset.read_text().replace("read_ns = 20_000", "read_ns = 3_600_000_000_000"))
    started = Daemon.start(media, str(slow), "wall", DEADLINE_S)
    yield started
    started.stop()


def run_host(program: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process with a host in it."""
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


# ---- killed ----------------------------------------------------------------------------------


def test_pending_commands_fail_at_once_when_the_daemon_is_killed(slow_daemon: Daemon) -> None:
    drive = Drive.connect(slow_daemon.address)
    drive.write(0, bytes(drive.block_bytes))
    reading = [drive._queue.submit(entries.read(0, 1), entries.data_of) for _ in range(8)]
    assert drive.alive()
    assert not any(command.done() for command in reading)
    os.kill(slow_daemon.pid, signal.SIGKILL)
    for command in reading:
        with pytest.raises(DriveLost, match=slow_daemon.address):
            command.result(timeout_s=DEADLINE_S)
    assert not drive.alive()
    with pytest.raises(DriveLost):
        drive.flush()
    with pytest.raises(DriveUnavailable, match=f"no drive answers at {slow_daemon.address}"):
        drive.reconnect()
    drive.close()


def test_what_was_flushed_is_there_after_a_kill(media: Path) -> None:
    with Drive.embedded(media, drive="tiny") as drive:
        drive.write(0, IMAGE)
        drive.flush()
        drive.load_program(PROGRAM, SHADOW)
        for number, sample in enumerate(SAMPLES.values(), PROGRAM + 1):
            drive.load_program(number, sample.encode("m"), activate=number % 2 == 0)
        programs = drive.programs()
        assert drive.daemon_pid is not None
        os.kill(drive.daemon_pid, signal.SIGKILL)
        window = Path(drive.window_path)
    assert not window.exists()
    with Drive.embedded(media, drive="tiny") as drive:
        assert drive.read(0, len(IMAGE)) == IMAGE
        assert drive.programs() == programs
        assert {entry["kind"] for entry in programs} == {kind.value for kind in ProgramKind}
        hidden = np.ones((1, HIDDEN), np.float32)
        target = StageTarget(FFN, keep=0.5)
        staged = drive.predict_and_stage(MODEL, PROGRAM, 0, hidden, [target]).result()
        assert staged.sites[0].unit_count == UNITS // 2


def test_a_host_reconnects_to_a_daemon_that_came_back(tmp_path: Path) -> None:
    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "csd_device.service", "serve", "--drive", "tiny"),
                *("--media", str(tmp_path / "d.csd"), "--listen", f"unix:{tmp_path / 's'}"),
            ],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"ready: tiny at unix:")
        return process

    first = start()
    drive = Drive.connect(f"unix:{tmp_path / 's'}")
    drive.write(0, IMAGE)
    drive.flush()
    drive.set_residency(MODEL, {FFN: np.arange(UNITS) >= 3})
    first.kill()
    first.wait()
    second = start()
    drive.reconnect()
    (site,) = drive.stage(MODEL, [StageTarget(FFN, all=True)]).result().sites
    assert site.unit_count == 3
    drive.close()
    second.terminate()
    assert second.wait(DEADLINE_S) == 0


def test_leases_of_a_killed_host_come_back(daemon: Daemon) -> None:
    program = f"""
        import sys
        from host_client.driver import Drive, StageTarget
        drive = Drive.connect(sys.argv[1])
        drive.stage({MODEL}, [StageTarget({FFN}, all=True)]).result()
        print("staged", flush=True)
        sys.stdin.read()
        drive.flush()
    """
    with Drive.connect(daemon.address) as drive:
        drive.write(0, IMAGE)
        drive.flush()
        host = run_host(program, daemon.address)
        assert host.stdout is not None
        try:
            assert host.stdout.readline() == "staged\n"
            assert drive.identify(Cns.WINDOW)["leases"] == 1
        finally:
            host.kill()
            host.wait()
        await_true(lambda: drive.identify(Cns.WINDOW)["leases"] == 0, "the dead host's leases")


# ---- stopped ---------------------------------------------------------------------------------


def test_sigterm_stops_it_cleanly(media: Path) -> None:
    daemon = Daemon.start(media, "tiny", "off", DEADLINE_S)
    drive = Drive.connect(daemon.address)
    window, socket = Path(drive.window_path), Path(daemon.address.removeprefix("unix:"))
    drive.write(0, IMAGE)
    os.kill(daemon.pid, signal.SIGTERM)
    assert daemon._process.wait(DEADLINE_S) == 0
    assert not window.exists()
    assert not socket.exists()
    with pytest.raises(DriveLost):
        drive.flush()
    drive.close()
    daemon.stop()
    with Drive.embedded(media, drive="tiny") as again:
        assert again.read(0, len(IMAGE)) == IMAGE


def test_an_embedded_daemon_ends_with_its_host_however_that_ends(media: Path) -> None:
    program = """
        import pathlib, sys
        from host_client.driver import Drive
        drive = Drive.embedded(pathlib.Path(sys.argv[1]), drive="tiny")
        print(drive.daemon_pid, flush=True)
        if sys.argv[2] == "wait":
            sys.stdin.read()
    """
    killed = run_host(program, str(media), "wait")
    assert killed.stdout is not None
    pid = int(killed.stdout.readline())
    killed.kill()
    killed.wait()
    await_true(lambda: not is_running(pid), "the end of a killed host's daemon")
    # A drive that is never closed keeps the process from exiting neither.
    exiting = run_host(program, str(media), "exit")
    said, _ = exiting.communicate(timeout=DEADLINE_S)
    assert exiting.returncode == 0
    await_true(lambda: not is_running(int(said)), "the end of an exited host's daemon")


# ---- served ----------------------------------------------------------------------------------


def test_health_and_reflection_are_served(daemon: Daemon) -> None:
    with grpc.insecure_channel(daemon.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "csd.v1.Controller"):
            answer = health.Check(
                health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S
            )
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as error:
            health.Check(health_pb2.HealthCheckRequest(service="no.such"), timeout=DEADLINE_S)
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (listed,) = stub.ServerReflectionInfo(iter([request]), timeout=DEADLINE_S)
    names = {service.name for service in listed.list_services_response.service}
    assert {"csd.v1.Controller", "grpc.health.v1.Health"} <= names


def test_another_protocol_version_is_refused_and_the_stream_ends(daemon: Daemon) -> None:
    hello = entries.connect("host", "id", 0).entry
    hello.connect.protocol_major = 2
    with grpc.insecure_channel(daemon.address) as channel:
        answers = list(ControllerStub(channel).QueuePair(iter([hello]), timeout=DEADLINE_S))
    assert [(a.status.sct, a.status.sc) for a in answers] == [
        (Status.PROTOCOL_VERSION.sct, Status.PROTOCOL_VERSION.sc)
    ]
    assert "the host speaks protocol 2.0, this drive 1.0" in answers[0].status.detail


def test_an_event_request_completes_when_another_queue_pair_causes_it(daemon: Daemon) -> None:
    """What one queue pair does is posted on another, which is silent meanwhile."""
    with Drive.connect(daemon.address) as watching, Drive.connect(daemon.address) as acting:
        request = pb.SubmissionEntry(opcode=AdminOpcode.ASYNC_EVENT, async_event=pb.AsyncEvent())
        command = entries.Command("Async Event", request)
        event = watching._queue.submit(command, lambda completion: completion.async_event)
        assert watching.alive()
        assert not event.done()
        acting.write(0, IMAGE)
        damaged = bytearray(IMAGE[-acting.block_bytes :])
        damaged[0] ^= 1
        acting.write(len(IMAGE) - acting.block_bytes, damaged)
        stage = acting.stage(MODEL, [StageTarget(FFN, all=True)])
        stage.add_done_callback(lambda _: None)
        assert event.result(DEADLINE_S).log_id == LogPage.SMART


def test_wall_time_holds_completions_until_they_are_due(media: Path) -> None:
    with Drive.embedded(media, drive="tiny", time="wall") as drive:
        drive.write(0, IMAGE)
        pending = [drive.stage(MODEL, [StageTarget(FFN, all=True)]) for _ in range(4)]
        timings = [command.result().timing for command in pending]
    for timing in timings:
        assert timing.done_ns > timing.submitted_ns
        assert timing.late_ns >= 0


def test_tcp_is_served_on_loopback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "csd_device.service", "serve", "--drive", "tiny"),
            *("--media", str(tmp_path / "d.csd"), "--listen", "127.0.0.1:0"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    address = process.stdout.readline().split(" at ")[1].split(",")[0]
    with Drive.connect(f"tcp:{address}") as drive:
        assert drive.alive()
    process.terminate()
    assert process.wait(DEADLINE_S) == 0


# ---- refused ---------------------------------------------------------------------------------


def test_nobody_there() -> None:
    with pytest.raises(DriveUnavailable, match=r"no drive answers at unix:/nonexistent/csd.sock"):
        Drive.connect("unix:/nonexistent/csd.sock")


def test_one_daemon_a_media_folder(shared_media: Path, daemon: Daemon) -> None:
    with pytest.raises(DriveUnavailable, match=f"did not start.*{daemon.pid}"):
        Drive.embedded(shared_media, drive="tiny")
