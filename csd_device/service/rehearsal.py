"""A rehearsal before the daemon says that it is ready: every hot path once, on a scratch drive.

Compiled kernels are loaded (on a machine's first run: compiled) when they are first called with
arguments of some type. The rehearsal makes those first calls the way hosts do, through a session,
on a small drive in a temporary folder that holds one small packed model and one shadow program.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csd_device.clock import TimeMode, VirtualClock
from csd_device.compute import rehearse_kernels
from csd_device.config import DriveConfig, load_config
from csd_device.drive import Drive
from csd_device.service.endpoint import Endpoint, Session
from csd_protocol import PROTOCOL_MAJOR, PROTOCOL_MINOR
from csd_protocol import packed as pk
from csd_protocol.crc32c import crc32c_units
from csd_protocol.csd.v1 import csd_pb2 as pb
from csd_protocol.opcodes import AdminOpcode, ComputeOpcode, NvmOpcode
from csd_protocol.program_file import ShadowLayer, encode_shadow
from csd_protocol.units import MIB, NS_PER_S

MODEL, PROGRAM, FFN = 1, 0, 0
UNITS, HIDDEN = 64, 64
_GROUP_VALUES = 32
_STAGED_TWICE = 2  # the second time units come from the unit cache


def rehearse() -> None:
    """Returns once every kernel that commands need has run."""
    rehearse_kernels()
    with tempfile.TemporaryDirectory(prefix="csd-rehearsal-") as folder:
        drive = Drive.open(
            _small_drive(),
            Path(folder) / "drive.csd",
            clock=VirtualClock(),
            time_mode=TimeMode.VIRTUAL,
            window_path=Path(folder) / "window",
        )
        session = Endpoint(drive).open()
        for cid, entry in enumerate(_script()):
            entry.cid = cid
            _perform(session, entry)
        drive.clock.advance_to(drive.clock.now_ns() + NS_PER_S)  # idle time: data moves
        _perform(session, _entry(pb.COMMAND_SET_NVM, NvmOpcode.FLUSH, flush=pb.Flush()))
        session.close()
        drive.close()


def micro_model() -> tuple[bytes, bytes]:
    """A drive's first bytes with one packed model, of one FFN; and a shadow program for it."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((UNITS, 3, HIDDEN)).astype(np.float16)
    layer = ShadowLayer(
        norm=np.ones(HIDDEN, np.float32),
        gate=values[:, 0].astype(np.float32),
        up=values[:, 1].astype(np.float32),
        down_norm=np.ones(UNITS, np.float32),
        down=values[:, 2].astype(np.float32),
    )
    program = encode_shadow("micro", {0: layer}, bits=4, group=_GROUP_VALUES, rms_eps=1e-5)
    return _packed(values.reshape(UNITS, -1).view(np.uint8)), program


def _small_drive() -> DriveConfig:
    """Superblocks of 512 KiB, whose data moves once every page has been read."""
    config = load_config("tiny")
    dram = config.dram.model_copy(update={"window_bytes": MIB, "unit_cache_bytes": MIB})
    geometry = config.geometry.model_copy(update={"pages_per_block": 1})
    ftl = config.ftl.model_copy(update={"reclaim_reads": 1})
    return config.model_copy(update={"dram": dram, "geometry": geometry, "ftl": ftl})


def _packed(units: npt.NDArray[np.uint8]) -> bytes:
    """Directory, manifest, CRC table and one site of `units` [count, unit_bytes]."""
    manifest_at, table_at, units_at = (
        pk.MODELS_OFFSET_BYTES + i * pk.BLOCK_BYTES for i in range(3)
    )
    site = pk.Site(
        site=FFN,
        role=pk.Role.FFN,
        kind=pk.UnitKind.NEURON,
        layer=0,
        count=UNITS,
        rows=3,
        cols=HIDDEN,
        offset_bytes=units_at,
        first_crc=0,
    )
    table = crc32c_units(units).astype("<u4").tobytes()
    model = pk.PackedModel(
        name="micro",
        family="llama",
        config={},
        dtype="float16",
        source="rehearsal",
        fingerprint="micro",
        sites=(site,),
        crc_table=pk.Extent(offset_bytes=table_at, length_bytes=len(table)),
    )
    manifest = pk.encode_manifest(model)
    entry = pk.DirectoryEntry(
        model=MODEL,
        name="micro",
        state="complete",
        fingerprint="micro",
        extent=pk.Extent(
            offset_bytes=manifest_at, length_bytes=units_at + units.size - manifest_at
        ),
        manifest=pk.Extent(offset_bytes=manifest_at, length_bytes=len(manifest)),
        progress=pk.Extent(offset_bytes=manifest_at, length_bytes=0),
    )
    image = bytearray(pk.align_up(units_at + units.size, pk.BLOCK_BYTES))
    directory = pk.encode_directory(pk.Directory(generation=0, models=(entry,)))
    pieces = (
        (0, directory),
        (manifest_at, manifest),
        (table_at, table),
        (units_at, units.tobytes()),
    )
    for offset, piece in pieces:
        image[offset : offset + len(piece)] = piece
    return bytes(image)


def _perform(session: Session, entry: pb.SubmissionEntry) -> None:
    session.handle(entry)
    (completion,) = session.take()
    assert completion.status.sct == completion.status.sc == 0, completion.status.detail


def _script() -> Iterator[pb.SubmissionEntry]:
    """What a host does: connects, packs, loads a program, predicts, stages, reads."""
    image, program = micro_model()
    connect = pb.Connect(
        protocol_major=PROTOCOL_MAJOR, protocol_minor=PROTOCOL_MINOR, host_id="rehearsal"
    )
    yield _entry(pb.COMMAND_SET_ADMIN, AdminOpcode.CONNECT, connect=connect)
    step = MIB
    for start in range(0, len(image), step):
        write = pb.Write(slba=start // pk.BLOCK_BYTES, data=image[start : start + step])
        yield _entry(pb.COMMAND_SET_NVM, NvmOpcode.WRITE, write=write)
    yield _entry(pb.COMMAND_SET_NVM, NvmOpcode.FLUSH, flush=pb.Flush())
    unused = pb.BlockRange(slba=1000, blocks=8)
    yield _entry(pb.COMMAND_SET_NVM, NvmOpcode.WRITE_ZEROES, blocks=unused)
    yield _entry(pb.COMMAND_SET_NVM, NvmOpcode.READ, blocks=pb.BlockRange(slba=0, blocks=256))
    define = pb.DefinePatterns(data=image[: pk.BLOCK_BYTES])
    yield _entry(pb.COMMAND_SET_NVM, NvmOpcode.DEFINE_PATTERNS, define_patterns=define)
    patterns = pb.WritePatterns(slba=1000, patterns=bytes(16))
    yield _entry(pb.COMMAND_SET_NVM, NvmOpcode.WRITE_PATTERNS, write_patterns=patterns)
    yield _entry(pb.COMMAND_SET_NVM, NvmOpcode.READ, blocks=unused)
    load = pb.LoadProgram(program=PROGRAM, total_bytes=len(program), chunk=program)
    yield _entry(pb.COMMAND_SET_ADMIN, AdminOpcode.LOAD_PROGRAM, load_program=load)
    activate = pb.ProgramActivation(program=PROGRAM, active=True)
    yield _entry(pb.COMMAND_SET_ADMIN, AdminOpcode.PROGRAM_ACTIVATION, program_activation=activate)
    yield from _staging()


def _staging() -> Iterator[pb.SubmissionEntry]:
    hidden = np.ones(HIDDEN, "<f4").tobytes()
    half = pb.StageTarget(site=FFN, keep=0.5)
    named = pb.StageTarget(site=FFN, units=np.array([1, 5], "<u4").tobytes())
    held = pb.HostResidency.Held(site=FFN, bitmap=b"\1" + bytes(UNITS // 8 - 1))
    residency = pb.HostResidency(model=MODEL, held=[held])
    yield _entry(pb.COMMAND_SET_COMPUTE, ComputeOpcode.HOST_RESIDENCY, host_residency=residency)
    for token in range(_STAGED_TWICE):
        predict = pb.PredictAndStage(
            model=MODEL, program=PROGRAM, token=token, hidden=hidden, targets=[half]
        )
        opcode = ComputeOpcode.PREDICT_AND_STAGE
        yield _entry(pb.COMMAND_SET_COMPUTE, opcode, predict_and_stage=predict)
        for target in (named, pb.StageTarget(site=FFN, all=True)):
            stage = pb.Stage(model=MODEL, targets=[target])
            yield _entry(pb.COMMAND_SET_COMPUTE, ComputeOpcode.STAGE, stage=stage)
    yield _entry(pb.COMMAND_SET_COMPUTE, ComputeOpcode.RELEASE, release=pb.Release())
    execute = pb.ExecuteProgram(program=PROGRAM, model=MODEL, hidden=hidden, keep=0.5)
    yield _entry(pb.COMMAND_SET_COMPUTE, ComputeOpcode.EXECUTE_PROGRAM, execute_program=execute)
    correct = pb.ExecuteProgram(
        program=PROGRAM, model=MODEL, hidden=hidden, wanted=pb.ExecuteProgram.WANTED_CORRECTION
    )
    yield _entry(pb.COMMAND_SET_COMPUTE, ComputeOpcode.EXECUTE_PROGRAM, execute_program=correct)


def _entry(command_set: "pb.CommandSet.ValueType", opcode: int, **body: Any) -> pb.SubmissionEntry:
    return pb.SubmissionEntry(set=command_set, opcode=opcode, nsid=1, **body)
