"""docs/COMMANDS.md says what csd_protocol's enumerations and the .proto file say."""

import re
from enum import IntEnum

import house_rules
import pytest
from google.protobuf.descriptor import Descriptor

from csd_protocol import opcodes, status
from csd_protocol.csd.v1 import csd_pb2 as pb

PAGE = (house_rules.ROOT / "docs" / "COMMANDS.md").read_text()
# Commands whose message does not bear their name.
MESSAGES = {
    "SET_FEATURES": "Features",
    "GET_FEATURES": "Features",
    "READ": "BlockRange",
    "WRITE_ZEROES": "BlockRange",
    "VERIFY": "BlockRange",
}
SETS = [
    ("## Admin commands", opcodes.AdminOpcode),
    ("## NVM commands", opcodes.NvmOpcode),
    ("## Compute commands", opcodes.ComputeOpcode),
]
MARKERS = [marker for marker, _ in SETS]


def table_after(text: str, marker: str) -> list[list[str]]:
    """The cells of the first table behind `marker`, its head left out."""
    behind = text[text.index(marker) :]
    rows = re.search(r"(?:^\|.*\n)+", behind, re.MULTILINE)
    assert rows is not None
    lines = rows[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def documented(marker: str, number: int = 0, name: int = 1) -> dict[str, int]:
    """Name -> hexadecimal number of a table's rows."""
    rows = table_after(PAGE, marker)
    return {row[name].strip("`"): int(row[number].rstrip("h"), 16) for row in rows}


def members(enumeration: type[IntEnum]) -> dict[str, int]:
    return {member.name: member.value for member in enumeration}


def backticked(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def message_of(command: str) -> Descriptor:
    name = MESSAGES.get(command, command.title().replace("_", ""))
    return pb.DESCRIPTOR.message_types_by_name[name]


@pytest.mark.parametrize(
    "marker, ours",
    [
        *SETS,
        ("| CNS |", opcodes.Cns),
        ("Log pages:", opcodes.LogPage),
        ("Features:", opcodes.Feature),
    ],
)
def test_numbers_agree(marker: str, ours: type[IntEnum]) -> None:
    assert documented(marker) == members(ours)


@pytest.mark.parametrize("marker", MARKERS)
def test_fields_and_origins_agree(marker: str) -> None:
    for opcode, name, origin, fields, *_ in table_after(PAGE, marker):
        declared = sorted(message_of(name.strip("`")).fields, key=lambda field: field.number)
        assert backticked(fields) == [field.name for field in declared]
        vendor = int(opcode.rstrip("h"), 16) >= 0xC0
        assert (origin == "vendor") is vendor, name


@pytest.mark.parametrize("marker", MARKERS)
def test_status_codes_named_by_commands_exist(marker: str) -> None:
    for *_, codes in table_after(PAGE, marker):
        assert set(backticked(codes)) <= set(status.Status.__members__)


def test_status_codes_agree() -> None:
    rows = table_after(PAGE, "## Status codes")
    assert rows == [
        [
            str(code.sct),
            f"{code.sc:02X}h",
            f"`{code.name}`",
            code.value.title,
            "vendor" if code.sct < 2 and code.sc >= 0xC0 else "NVMe",
            "yes" if code.value.retryable else "no",
        ]
        for code in sorted(status.Status, key=lambda code: (code.sct, code.sc))
    ]


def test_a_row_that_differs_is_caught() -> None:
    planted = "## X\n\n| a | b |\n| --- | --- |\n| 02h | `GET_LOG_PAGES` |\n"
    assert table_after(planted, "## X") == [["02h", "`GET_LOG_PAGES`"]]
    assert {"GET_LOG_PAGES": 2}.items() - members(opcodes.AdminOpcode).items()
