"""The command table of `csd`: what it says of commands that it has not imported."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from host_client.cli.app import Commands, app


@pytest.mark.parametrize("name", Commands.table)
def test_the_table_says_what_the_command_says(name: str) -> None:
    entry = Commands.table[name]
    command = entry.load(name)
    assert command.name == name
    assert command.help.splitlines()[0] == entry.help


def test_help_lists_every_command() -> None:
    said = CliRunner().invoke(app, ["--help"]).stdout
    assert all(f"│ {name} " in said for name in Commands.table)


def test_an_unknown_command_is_refused() -> None:
    ended = CliRunner().invoke(app, ["genrate"])
    assert ended.exit_code == 2
    assert "No such command 'genrate'" in ended.output


@pytest.mark.parametrize("name", ["models", "remove", "plan", "identify", "log"])
def test_what_needs_no_torch_does_not_import_it(name: str) -> None:
    entry = Commands.table[name]
    code = f"import {entry.module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
