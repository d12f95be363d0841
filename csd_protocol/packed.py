"""The packed-model format: how models lie on a drive.

    byte 0          directory, slot 0     one of the two slots is current: the valid one with the
    byte 512 KiB    directory, slot 1     higher generation; a torn write leaves the other
    byte 1 MiB ..   models, one extent each, aligned to 1 MiB:
                        manifest          JSON, `PackedModel`; two slots, the directory says which
                        CRC table         uint32 little endian, one a unit, sites in order
                        progress          one logical block while packing, `Progress`
                        frequencies       uint32 little endian, one a neuron, layers in order;
                                          two slots, the manifest says which
                        sites             arrays of equal units, each site aligned to a block

A *site* is an array of units of one kind, one layer and one size, so the place of a unit is
`offset_bytes + index * unit_bytes`. Units hold 16-bit values, row after row. `docs/FORMAT.md` has
the bytes.
"""

import struct
from enum import StrEnum
from math import prod
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from csd_protocol.crc32c import crc32c

FORMAT_VERSION: Final = 1
BLOCK_BYTES = 4096
DIRECTORY_SLOT_BYTES = 512 * 1024
DIRECTORY_SLOTS = 2
MODELS_OFFSET_BYTES = DIRECTORY_SLOT_BYTES * DIRECTORY_SLOTS
MODEL_ALIGN_BYTES = 1 << 20
VALUE_BYTES = 2

_HEADER = struct.Struct("<8sIIQI")  # magic, format version, payload bytes, generation, CRC32C
_MAGIC = b"CSDMODEL"


class FormatError(ValueError):
    """Bytes that are not what the format says. The message names what and where."""


class UnitKind(StrEnum):
    NEURON = "neuron"  # gate row, up row, down column of one FFN neuron
    HEAD = "head"  # query rows and output columns of one KV group
    TENSOR = "tensor"  # anything taken whole
    ROW = "row"  # one row of the embedding or of the output head


class Role(StrEnum):
    FFN = "ffn"
    HEADS = "heads"
    KV = "kv"
    NORMS = "norms"
    EMBED = "embed"
    FINAL_NORM = "final_norm"
    LM_HEAD = "lm_head"


Count = Annotated[int, Field(gt=0)]
Offset = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Extent(_Record):
    """A run of bytes in the namespace."""

    offset_bytes: Offset
    length_bytes: Offset
    crc32c: Annotated[int, Field(ge=0, lt=1 << 32)] = 0


class Part(_Record):
    """One tensor inside a `tensor` unit; parts follow each other without gaps."""

    name: str
    shape: tuple[Count, ...]


class Site(_Record):
    """An array of `count` units of `rows` x `cols` 16-bit values each."""

    site: Offset  # its index in PackedModel.sites
    role: Role
    kind: UnitKind
    layer: int  # -1: belongs to no layer
    count: Count
    rows: Count
    cols: Count
    offset_bytes: Offset
    first_crc: Offset  # index of unit 0 in the CRC table
    parts: tuple[Part, ...] = ()

    @property
    def values(self) -> int:
        """Values in one unit."""
        return self.rows * self.cols

    @property
    def unit_bytes(self) -> int:
        return self.values * VALUE_BYTES

    @property
    def length_bytes(self) -> int:
        return self.count * self.unit_bytes

    @property
    def name(self) -> str:
        return self.role.value if self.layer < 0 else f"layers.{self.layer}.{self.role.value}"


class PackedModel(_Record):
    """A model's manifest: its transformers config and where each unit lies."""

    format_version: Literal[1] = FORMAT_VERSION
    name: str
    family: str
    config: dict[str, Any]
    dtype: Literal["float16", "bfloat16"]
    source: str  # what it was packed from, for people
    fingerprint: str  # of the source; a resumed pack must match it
    sites: tuple[Site, ...]
    crc_table: Extent
    frequencies: Extent | None = None
    frequency_tokens: Offset = 0  # how many tokens the frequencies were counted over

    def find(self, role: Role, layer: int = -1) -> Site:
        """The site with this role in this layer. Raises KeyError naming it."""
        for site in self.sites:
            if site.role is role and site.layer == layer:
                return site
        raise KeyError(f"{self.name} has no site {role.value} in layer {layer}")

    @property
    def layer_count(self) -> int:
        return 1 + max(site.layer for site in self.sites)

    @property
    def unit_count(self) -> int:
        return sum(site.count for site in self.sites)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all units: the model's weights at 16 bits."""
        return sum(site.length_bytes for site in self.sites)


class DirectoryEntry(_Record):
    model: Annotated[int, Field(gt=0)]  # identifier used by commands
    name: str
    state: Literal["packing", "complete"]
    fingerprint: str
    extent: Extent
    manifest: Extent
    progress: Extent


class Directory(_Record):
    """The models on a drive. `generation` grows with each write."""

    generation: Offset = 0
    models: tuple[DirectoryEntry, ...] = ()

    def find(self, name: str) -> DirectoryEntry | None:
        return next((entry for entry in self.models if entry.name == name), None)


class Progress(_Record):
    """How far a pack has come: sites before `next_site` are on the drive with their CRCs."""

    fingerprint: str
    next_site: Offset


def _seal(payload: bytes, generation: int) -> bytes:
    return _HEADER.pack(_MAGIC, FORMAT_VERSION, len(payload), generation, crc32c(payload)) + payload


def _unseal(data: bytes, what: str) -> tuple[int, bytes]:
    if len(data) < _HEADER.size or data[: len(_MAGIC)] != _MAGIC:
        raise FormatError(f"{what}: no packed-model record here (magic missing)")
    _, version, length, generation, checksum = _HEADER.unpack_from(data)
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{what}: format version {version}; this version reads {FORMAT_VERSION}. Pack again"
        )
    payload = bytes(data[_HEADER.size : _HEADER.size + length])
    if len(payload) != length or crc32c(payload) != checksum:
        raise FormatError(f"{what}: torn or damaged record (CRC32C does not match)")
    return generation, payload


def directory_slot(generation: int) -> int:
    """Byte offset of the slot that a directory of this generation is written to."""
    return (generation % DIRECTORY_SLOTS) * DIRECTORY_SLOT_BYTES


def encode_directory(directory: Directory) -> bytes:
    """The bytes of one directory slot. Raises FormatError when it is too large for one."""
    sealed = _seal(directory.model_dump_json().encode(), directory.generation)
    if len(sealed) > DIRECTORY_SLOT_BYTES:
        raise FormatError(
            f"directory of {len(directory.models)} models takes {len(sealed)} bytes; "
            f"a slot has {DIRECTORY_SLOT_BYTES}. Remove a model"
        )
    return sealed


def decode_directory(slots: list[bytes]) -> Directory:
    """The current directory out of both slots; an empty one when neither was ever written.

    Raises FormatError when something was written but no slot is valid.
    """
    valid: list[Directory] = []
    failures: list[FormatError] = []
    for number, data in enumerate(slots):
        if not any(data[: len(_MAGIC)]):
            continue
        try:
            _, payload = _unseal(data, f"directory slot {number}")
            valid.append(Directory.model_validate_json(payload))
        except FormatError as error:
            failures.append(error)
        except ValidationError as error:
            failures.append(FormatError(f"directory slot {number}: {error}"))
    if valid:
        return max(valid, key=lambda directory: directory.generation)
    if failures:
        raise failures[0]
    return Directory()


def encode_manifest(model: PackedModel) -> bytes:
    return _seal(model.model_dump_json().encode(), 0)


def decode_manifest(data: bytes) -> PackedModel:
    """Raises FormatError when the bytes are torn, of another version or inconsistent."""
    _, payload = _unseal(data, "manifest")
    try:
        model = PackedModel.model_validate_json(payload)
    except ValidationError as error:
        raise FormatError(f"manifest: {error}") from error
    first_crc = 0
    for index, site in enumerate(model.sites):
        if site.site != index or site.first_crc != first_crc:
            raise FormatError(f"manifest of {model.name}: site {site.name} is out of order")
        if site.offset_bytes % BLOCK_BYTES:
            raise FormatError(f"manifest of {model.name}: site {site.name} is not on a block")
        if site.parts and site.values != sum(prod(part.shape) for part in site.parts):
            raise FormatError(f"manifest of {model.name}: parts of {site.name} do not fill it")
        first_crc += site.count
    if model.crc_table.length_bytes != 4 * first_crc:
        raise FormatError(f"manifest of {model.name}: CRC table does not cover its units")
    return model


def encode_progress(progress: Progress) -> bytes:
    sealed = _seal(progress.model_dump_json().encode(), progress.next_site)
    return sealed.ljust(BLOCK_BYTES, b"\0")


def decode_progress(data: bytes) -> Progress | None:
    """None when nothing valid was written yet."""
    try:
        return Progress.model_validate_json(_unseal(data, "progress")[1])
    except (FormatError, ValidationError):
        return None


def align_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
