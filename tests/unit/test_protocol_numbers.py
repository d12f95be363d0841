"""Opcodes stand in the .proto file once; Python's enums and the stubs agree with it."""

import runpy
from pathlib import Path

import pytest

from csd_protocol import opcodes
from csd_protocol.csd.v1 import csd_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "ours, wire, prefix",
    [
        (opcodes.CommandSet, pb.CommandSet, "COMMAND_SET_"),
        (opcodes.AdminOpcode, pb.AdminOpcode, "ADMIN_OPCODE_"),
        (opcodes.NvmOpcode, pb.NvmOpcode, "NVM_OPCODE_"),
        (opcodes.ComputeOpcode, pb.ComputeOpcode, "COMPUTE_OPCODE_"),
        (opcodes.Cns, pb.Identify.Cns, "CNS_"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_enums_are_those_of_the_proto(ours, wire, prefix: str) -> None:
    named = {name.removeprefix(prefix): number for name, number in wire.items()}
    named.pop("UNUSED", None)
    assert {member.name: member.value for member in ours} == named


def test_stubs_have_not_drifted_and_drift_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("grpc_tools")
    script = runpy.run_path(str(ROOT / "proto/generate.py"))
    assert script["drifted"]() == []
    script["generate"](tmp_path)
    stub = tmp_path / "csd_protocol/csd/v1/csd_pb2.pyi"
    stub.write_text(stub.read_text() + "# changed by hand\n")
    (tmp_path / "csd_protocol/csd/v1/left_over_pb2.py").write_text("")
    monkeypatch.setitem(
        script["drifted"].__globals__,
        "contents",
        lambda folder: script["contents"](tmp_path if folder == ROOT else folder),
    )
    assert script["drifted"]() == [
        "csd_protocol/csd/v1/csd_pb2.pyi",
        "csd_protocol/csd/v1/left_over_pb2.py",
    ]
