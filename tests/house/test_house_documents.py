"""Links lead somewhere, and what a document tells people to type exists."""

from pathlib import Path

import house_rules
import pytest
from typer.main import get_command

DOCUMENTS = sorted(
    path for folder in (".", "docs") for path in (house_rules.ROOT / folder).glob("*.md")
)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(path: Path) -> None:
    assert house_rules.broken_links(path, path.read_text()) == []


def known_commands() -> dict[str, set[str]]:
    """Subcommands of both programs."""
    from csd_device.service import cli as device_cli
    from host_client.cli import app as host_cli

    device = set(getattr(get_command(device_cli.app), "commands", {}))
    return {"csd": set(host_cli.Commands.table), "csd-device": device}


def unknown_commands(text: str, targets: set[str], subcommands: dict[str, set[str]]) -> list[str]:
    """Commands in `text` that name a make target or a subcommand that does not exist."""
    found = []
    for words in house_rules.shell_commands(text):
        program = Path(words[0]).name
        if program == "make":
            named = [word for word in words[1:] if "=" not in word]
            found += [f"make {target}" for target in named if target not in targets]
        elif program in subcommands and not set(words[1:2]) <= subcommands[program] | {"--help"}:
            found.append(f"{program} {words[1]}")
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(path: Path) -> None:
    found = unknown_commands(path.read_text(), house_rules.make_targets(), known_commands())
    assert found == []


def test_the_readme_names_the_two_commands() -> None:
    commands = house_rules.shell_commands((house_rules.ROOT / "README.md").read_text())
    assert ["make", "demo"] in commands
    assert ["make", "test"] in commands


# ---- planted faults --------------------------------------------------------------------------


def test_a_dead_link_and_a_dead_anchor_are_caught(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A `b` heading\n")
    text = "[x](gone.md) [y](there.md#a-b-heading) [z](there.md#no) [w](https://a.example/b)"
    found = house_rules.broken_links(tmp_path / "page.md", text)
    assert found == ["page.md: gone.md leads nowhere", "page.md: there.md#no: no such heading"]


def test_an_unknown_command_is_caught() -> None:
    text = "```\nmake nothing X=1\ncsd pack m # fine\nA=1 csd \\\n  fly\nls\n```\n`csd swim`\n"
    assert unknown_commands(text, {"demo"}, {"csd": {"pack"}}) == ["make nothing", "csd fly"]
