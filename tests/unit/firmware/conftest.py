"""A small packed model on a tiny drive, and a host that talks to it without a network."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from csd_device.clock import TimeMode, VirtualClock
from csd_device.config import DriveConfig, load_config
from csd_device.drive import Drive
from csd_device.firmware import QueuePair
from csd_device.firmware import commands as c
from csd_protocol.crc32c import crc32c, crc32c_units
from csd_protocol.packed import (
    MODELS_OFFSET_BYTES,
    Directory,
    DirectoryEntry,
    Extent,
    PackedModel,
    Role,
    Site,
    UnitKind,
    align_up,
    directory_slot,
    encode_directory,
    encode_manifest,
)
from csd_protocol.program_file import ShadowLayer, encode_shadow
from csd_protocol.status import Status
from csd_protocol.unit_table import UnitTable

HIDDEN, NEURONS, LAYERS = 64, 96, 2
BLOCK = 4096
CONFIG = load_config("tiny")


@dataclass(frozen=True)
class Packed:
    """A model as it lies on the drive, and its units as they were packed."""

    writes: list[tuple[int, bytes]]  # (byte offset, whole blocks)
    manifest: PackedModel
    units: list[np.ndarray]  # by site: uint8 [count, unit_bytes]

    def find(self, role: Role, layer: int = -1) -> int:
        return self.manifest.find(role, layer).site


def blocks(data: bytes) -> bytes:
    return data.ljust(align_up(len(data), BLOCK), b"\0")


def site_shapes() -> list[tuple[Role, UnitKind, int, int, int]]:
    """(role, kind, layer, count, rows) of each site; all are HIDDEN wide."""
    shapes = [(Role.EMBED, UnitKind.ROW, -1, 50, 1)]
    for layer in range(LAYERS):
        shapes += [
            (Role.KV, UnitKind.TENSOR, layer, 1, 32),
            (Role.FFN, UnitKind.NEURON, layer, NEURONS, 3),
        ]
    return shapes


def mixture_shapes(experts: int = 4) -> list[tuple[Role, UnitKind, int, int, int]]:
    """The same with a router and several FFNs in each layer."""
    shapes = []
    for shape in site_shapes():
        if shape[0] is Role.FFN:
            shapes.append((Role.ROUTER, UnitKind.ROW, shape[2], experts, 1))
            shapes += [shape] * experts
        else:
            shapes.append(shape)
    return shapes


def pack(model: int = 1, copies: int = 1, mixture: bool = False, placed: bool = False) -> Packed:
    rng = np.random.default_rng(model)
    at = MODELS_OFFSET_BYTES + 64 * BLOCK
    sites: list[Site] = []
    units: list[np.ndarray] = []
    writes: list[tuple[int, bytes]] = []
    slots: dict[int, np.ndarray] = {}
    first_crc = 0
    for role, kind, layer, count, rows in mixture_shapes() if mixture else site_shapes():
        expert = sites[-1].expert + 1 if mixture and role is Role.FFN else -1
        site = Site(
            site=len(sites), role=role, kind=kind, layer=layer, count=count, rows=rows,
            cols=HIDDEN, offset_bytes=at, first_crc=first_crc, expert=expert,
        )  # fmt: skip
        content = rng.integers(0, 256, (count, site.unit_bytes), np.uint8)
        lying = content
        if placed and role is Role.FFN:
            slots[site.site] = rng.permutation(count).astype(np.uint32)
            lying = content[np.argsort(slots[site.site])]
        writes.append((at, blocks(lying.tobytes())))
        sites.append(site)
        units.append(content)
        at = align_up(at + site.length_bytes, BLOCK)
        first_crc += count
    crcs = np.concatenate([crc32c_units(content) for content in units])
    table = UnitTable(crcs, slots).encode()
    table_extent = Extent(
        offset_bytes=MODELS_OFFSET_BYTES + 32 * BLOCK, length_bytes=len(table), crc32c=crc32c(table)
    )
    stride = align_up(at - table_extent.offset_bytes, BLOCK)
    manifest = PackedModel(
        name="m", family="llama", config={}, dtype="float16", source="test", fingerprint="f",
        sites=tuple(sites), crc_table=table_extent, copies=copies,
        copy_stride_bytes=stride if copies > 1 else 0,
        placed=placed,
    ).in_oldest_version  # fmt: skip
    writes.append((table_extent.offset_bytes, blocks(table)))
    once = list(writes)
    for copy in range(1, copies):
        writes += [(offset + copy * stride, data) for offset, data in once]
    at += (copies - 1) * stride
    encoded = encode_manifest(manifest)
    entry = DirectoryEntry(
        model=model,
        name="m",
        state="complete",
        fingerprint="f",
        extent=Extent(offset_bytes=MODELS_OFFSET_BYTES, length_bytes=at - MODELS_OFFSET_BYTES),
        manifest=Extent(offset_bytes=MODELS_OFFSET_BYTES, length_bytes=len(encoded)),
        progress=Extent(offset_bytes=MODELS_OFFSET_BYTES + 31 * BLOCK, length_bytes=BLOCK),
    )
    packing = entry.model_copy(update={"model": 9, "name": "half", "state": "packing"})
    directory = Directory(generation=1, models=(entry, packing))
    writes.append((MODELS_OFFSET_BYTES, blocks(encoded)))
    writes.append((directory_slot(1), blocks(encode_directory(directory))))
    return Packed(writes, manifest, units)


class Host:
    """Submits one command at a time and pops its completion."""

    def __init__(self, drive: Drive, host_id: str = "host", depth: int = 0) -> None:
        self.drive = drive
        self.queue: QueuePair = drive.connect("test", host_id, depth)
        self._cid = 0

    def submit(self, command: c.Command) -> int:
        self._cid += 1
        self.queue.submit(self._cid, command, self.drive.clock.now_ns())
        return self._cid

    def run(self, command: c.Command) -> c.Completion:
        cid = self.submit(command)
        done = self.queue.pop_due(1 << 62)
        return next(completion for completion in done if completion.cid == cid)

    def ok(self, command: c.Command) -> c.Completion:
        completion = self.run(command)
        assert completion.status is Status.SUCCESS, completion
        return completion

    def write(self, offset_bytes: int, data: bytes) -> None:
        step = CONFIG.queues.mdts_bytes
        for start in range(0, len(data), step):
            piece = data[start : start + step]
            self.ok(c.Write((offset_bytes + start) // BLOCK, piece))

    def pack(self, packed: Packed) -> None:
        for offset_bytes, data in packed.writes:
            self.write(offset_bytes, data)

    def load(self, number: int, data: bytes, chunk: int = 1 << 20) -> None:
        for start in range(0, len(data), chunk):
            piece = data[start : start + chunk]
            self.ok(c.LoadProgram(number, len(data), start, piece))
        self.ok(c.ProgramActivation(number, True))

    def window(self, site: c.StagedSite) -> np.ndarray:
        """The staged bytes, as a host reads them: from the file."""
        data = np.fromfile(
            self.drive.window_path, np.uint8, site.length_bytes, offset=site.window_offset
        )
        return data.reshape(site.unit_count, -1)


def shadow_program(bits: int = 4) -> bytes:
    rng = np.random.default_rng(5)
    layers = {
        layer: ShadowLayer(
            norm=np.ones(HIDDEN, np.float32),
            gate=rng.standard_normal((NEURONS, HIDDEN)).astype(np.float32),
            up=rng.standard_normal((NEURONS, HIDDEN)).astype(np.float32),
            down_norm=rng.uniform(0.5, 1, NEURONS).astype(np.float32),
        )
        for layer in range(LAYERS)
    }
    return encode_shadow("m", layers, bits=bits, group=32, rms_eps=1e-5)


@pytest.fixture(scope="session")
def packed() -> Packed:
    return pack()


@pytest.fixture(scope="session")
def pack_model() -> Callable[..., Packed]:
    return pack


@pytest.fixture(scope="session")
def shadow() -> bytes:
    return shadow_program()


Open = Callable[..., Drive]


@pytest.fixture
def open_drive(tmp_path: Path) -> Iterator[Open]:
    """Opens drives on the test's own media; closes what is left open."""
    drives: list[Drive] = []

    def open_it(mode: TimeMode = TimeMode.OFF, config: DriveConfig = CONFIG) -> Drive:
        drive = Drive.open(
            config,
            tmp_path / "drive.csd",
            clock=VirtualClock(),
            time_mode=mode,
            window_path=tmp_path / "window",
        )
        drives.append(drive)
        return drive

    yield open_it
    for drive in drives:
        drive.close()


@pytest.fixture
def drive(open_drive: Open) -> Drive:
    return open_drive()


@pytest.fixture
def host(drive: Drive) -> Host:
    return Host(drive)


@pytest.fixture
def staged_host(host: Host, packed: Packed, shadow: bytes) -> Host:
    """A host whose drive holds the packed model and an active shadow program, number 7."""
    host.pack(packed)
    host.load(7, shadow)
    return host


@pytest.fixture(scope="session")
def packed_twice() -> Packed:
    return pack(copies=2)


@pytest.fixture(scope="session")
def packed_mixture() -> Packed:
    """Four experts a layer."""
    return pack(mixture=True)


@pytest.fixture
def make_host() -> Callable[..., Host]:
    return Host
