"""A command group that imports a command when it is run.

torch and transformers take seconds to import; `csd log` needs neither. So the table names where a
command is and what `csd --help` says of it, and nothing is imported for those that are not asked
for. Click's own types are Any here: some releases of Typer use click, some a copy of it.
"""

import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a command is: a function, or a `typer.Typer` of its own, in a module."""

    module: str
    attribute: str
    help: str  # the first line of its docstring
    launcher: "Launcher | None" = None

    def chosen(self, args: list[str]) -> "Entry":
        """What carries out the command with these arguments."""
        launcher = self.launcher
        if launcher and launcher.option in args and launcher.variable not in os.environ:
            return launcher.entry
        return self

    def load(self, name: str) -> Any:
        found: Any = getattr(import_module(self.module), self.attribute)
        if not isinstance(found, typer.Typer):
            alone = typer.Typer(add_completion=False)
            alone.command(name)(found)
            found = alone
        command = get_command(found)
        command.name = name
        return command


@dataclass(frozen=True, slots=True)
class Launcher:
    """What, given this option, starts the command anew with this variable in its environment."""

    option: str
    variable: str
    entry: Entry


class OnDemandGroup(TyperGroup):
    """Subclasses say what there is in `table`, in the order of `--help`."""

    table: ClassVar[dict[str, Entry]] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in with the name and the help of the command."""
        entry = self.table.get(cmd_name)
        return TyperCommand(cmd_name, help=entry.help) if entry else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command itself, imported now."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in self.table:
            command = self.table[name].chosen(rest).load(name)
        return name, command, rest
