"""`csd-device`: what it refuses, with which message and exit status."""

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from csd_device.config import load_config, preset_names
from csd_device.service.cli import app


def serve(*options: str) -> Result:
    return CliRunner().invoke(app, ["serve", *options])


@pytest.mark.parametrize(
    "options, status, message",
    [
        (("--drive", "no-such", "--listen", "unix:s"), 1, "drive 'no-such' is no preset"),
        (("--drive", "tiny", "--listen", "0.0.0.0:0"), 2, "say --allow-remote"),
        (("--drive", "tiny", "--listen", "nowhere"), 2, "write unix:PATH or HOST:PORT"),
        (("--drive", "tiny", "--listen", "unix:s", "--time", "soon"), 2, "soon"),
    ],
)
def test_refusals(tmp_path: Path, options: tuple[str, ...], status: int, message: str) -> None:
    media = tmp_path / "drive.csd"
    refused = serve("--media", str(media), *options)
    assert refused.exit_code == status
    assert message in refused.stderr
    assert not media.exists()


def test_a_socket_where_another_daemon_answers(tmp_path: Path) -> None:
    path = tmp_path / "taken.sock"
    window = tmp_path / "window"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        refused = serve(
            *("--drive", "tiny", "--media", str(tmp_path / "drive.csd")),
            *("--listen", f"unix:{path}", "--window", str(window)),
        )
    assert refused.exit_code == 1
    assert "another daemon answers there" in refused.stderr
    assert not window.exists()


def test_drives_lists_the_presets() -> None:
    listed = CliRunner().invoke(app, ["drives"])
    assert [line.split("\t")[0] for line in listed.stdout.splitlines()] == preset_names()


def test_drives_describes_one_and_prints_its_toml(tmp_path: Path) -> None:
    (line,) = CliRunner().invoke(app, ["drives", "reference"]).stdout.splitlines()
    assert line.split("\t")[:4] == ["reference", "16.0 GB", "8x4x2", "slc"]
    printed = CliRunner().invoke(app, ["drives", "edge-gen5", "--toml"]).stdout
    own = tmp_path / "own.toml"
    own.write_text(printed)
    assert load_config(own) == load_config("edge-gen5")
    refused = CliRunner().invoke(app, ["drives", str(own), "--toml"])
    assert refused.exit_code == 1
    assert "no preset" in refused.stderr
