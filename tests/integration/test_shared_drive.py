"""Host and drive as two processes (two containers under `make integration`)."""

import json
import os
import stat
from pathlib import Path

import pytest

from csd_device.service import health
from csd_protocol import opcodes
from csd_protocol.address import parse_address
from host_client.driver import Drive

BLOCK = 4096


def test_the_drive_says_that_it_serves(drive_address: str) -> None:
    serves, said = health.ask(parse_address(drive_address))
    assert serves
    assert said == f"the drive at {drive_address} says SERVING"


def test_where_no_drive_is_nothing_serves(tmp_path: Path) -> None:
    serves, said = health.ask(parse_address(f"unix:{tmp_path}/none.sock"))
    assert not serves
    assert said.startswith(f"no drive answers at unix:{tmp_path}/none.sock")


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
