"""Host and drive as two processes (two containers under `make integration`)."""

import json
import os
import stat
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from csd_protocol import opcodes
from host_client.driver import Drive

BLOCK = 4096


def test_the_drive_says_that_it_serves(drive_address: str) -> None:
    with grpc.insecure_channel(drive_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service="csd.v1.Controller"), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_what_was_written_is_read_by_another_host(drive: Drive, drive_address: str) -> None:
    data = os.urandom(8 * BLOCK)
    drive.write(64 << 20, data)
    drive.flush()
    with Drive.connect(drive_address) as other:
        assert other.read(64 << 20, len(data)) == data
    drive.deallocate(64 << 20, len(data))
    assert drive.read(64 << 20, BLOCK) == bytes(BLOCK)


def test_the_window_is_a_file_here_that_cannot_be_written(drive: Drive) -> None:
    """Under `make integration` the volume itself is read-only."""
    path = Path(drive.window_path)
    assert path.stat().st_size == drive.window_bytes
    assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0
    if "CSD_DRIVE" in os.environ:
        with pytest.raises(OSError, match="Read-only file system"):
            path.open("r+b")


def test_the_reader_is_the_expected_one(drive: Drive) -> None:
    """A seccomp profile that is too narrow must not pass by falling back to threads."""
    from host_client.io import open_reader

    expected = os.environ.get("CSD_EXPECT_READER")
    with open_reader(Path(drive.window_path)) as reader:
        assert reader.name in {"io_uring", "threads"}
        assert expected is None or reader.name == expected


def test_identify_is_plain_json(drive: Drive) -> None:
    for cns in opcodes.Cns:
        assert json.loads(json.dumps(drive.identify(cns)))
