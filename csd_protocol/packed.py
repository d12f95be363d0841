"""The packed-model format: how models lie on a drive.

    byte 0          directory, slot 0     one of the two slots is current: the valid one with the
    byte 512 KiB    directory, slot 1     higher generation; a torn write leaves the other
    byte 1 MiB ..   models, one extent each, aligned to 1 MiB:
                        manifest          JSON, `PackedModel`; two slots, the directory says which
                        CRC table         uint32 little endian, one a unit, sites in order; of a
                                          placed model the slots of its neurons behind them
                        progress          one logical block while packing, `Progress`
                        frequencies       uint32 little endian, one a neuron, layers in order,
                        calibration       and what else was measured; two slots of each, the
                                          manifest says which
                        sites             arrays of equal units, each site aligned to a block

A *site* is an array of units of one kind, one layer and one size, so the place of a unit is
`offset_bytes + index * unit_bytes`; in the FFNs of a *placed* model, `offset_bytes + slot[index] *
unit_bytes` (`csd_protocol.unit_table`). Units hold 16-bit values, row after row, or rows of them in
12 bits (`lossless_units`), or of 8- or 4-bit levels (`low_bit_units`). A model packed in several
copies has all of its sites, and the CRC table, once more at each multiple of `copy_stride_bytes`.
`docs/FORMAT.md` has the bytes.
"""

import struct
from enum import StrEnum
from math import prod
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from csd_protocol.crc32c import crc32c
from csd_protocol.lossless_units import COLS_MAX, lossless_row_bytes
from csd_protocol.low_bit_units import GROUP, low_bit_row_bytes

FORMAT_VERSION: Final = 1
COPIES_VERSION: Final = 2  # of a manifest with more than one copy
EXTENDED_VERSION: Final = 3  # of the manifest of a mixture
LEVELS_VERSION: Final = 4  # of a manifest with a calibration, a placement or units of 8 or 4 bits
NEWEST_VERSION: Final = 5  # of a manifest with units of 12 bits
COPIES_MAX = 4
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
    ROUTER = "router"  # of a mixture: a row of the router is an expert


Version = Literal[1, 2, 3, 4, 5]
Bits = Literal[16, 12, 8, 4]
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
    """An array of `count` units of `rows` x `cols` values each."""

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
    expert: int = -1  # of a mixture's layer, whose FFN this is; -1: no expert's
    bits: Bits = 16  # of each value; 12: rows as in `lossless_units`; less: in `low_bit_units`

    @property
    def values(self) -> int:
        """Values in one unit."""
        return self.rows * self.cols

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.cols, self.bits)

    @property
    def unit_bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def length_bytes(self) -> int:
        return self.count * self.unit_bytes

    @property
    def name(self) -> str:
        if self.expert >= 0:
            return f"layers.{self.layer}.experts.{self.expert}"
        return self.role.value if self.layer < 0 else f"layers.{self.layer}.{self.role.value}"


class PackedModel(_Record):
    """A model's manifest: its transformers config and where each unit lies."""

    format_version: Version = FORMAT_VERSION
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
    copies: Annotated[int, Field(ge=1, le=COPIES_MAX)] = 1  # how often each site lies on the drive
    copy_stride_bytes: Offset = 0  # from a site in one copy to the same in the next
    calibration: Extent | None = None
    placed: bool = False  # whether the CRC table says in which slot of its site each neuron lies

    def find(self, role: Role, layer: int = -1) -> Site:
        """The site with this role in this layer, no expert's. Raises KeyError naming it."""
        for site in self.sites:
            if site.role is role and site.layer == layer and site.expert < 0:
                return site
        raise KeyError(f"{self.name} has no site {role.value} in layer {layer}")

    def ffns(self, layer: int | None = None) -> tuple[Site, ...]:
        """The FFN sites of a layer, or of all: one a layer, or one an expert of it."""
        return tuple(
            site
            for site in self.sites
            if site.role is Role.FFN and (layer is None or site.layer == layer)
        )

    @property
    def experts(self) -> int:
        """Experts of each layer; 0: this is no mixture."""
        return 1 + max(site.expert for site in self.sites)

    def program_layer(self, site: Site) -> int:
        """What programs and frequencies call a site's layer: experts are counted through."""
        return site.layer if site.expert < 0 else site.layer * self.experts + site.expert

    @property
    def extended(self) -> bool:
        """Whether the manifest says what only EXTENDED_VERSION can say."""
        return any(site.expert >= 0 or site.role is Role.ROUTER for site in self.sites)

    @property
    def calibrated(self) -> bool:
        """Whether the manifest has a calibration, or a placement."""
        return self.placed or self.calibration is not None

    @property
    def oldest_version(self) -> Version:
        """The oldest format version that can say what the manifest says."""
        if any(site.bits == 12 for site in self.sites):
            return NEWEST_VERSION
        if self.calibrated or self.low_bit:
            return LEVELS_VERSION
        if self.extended:
            return EXTENDED_VERSION
        return FORMAT_VERSION if self.copies == 1 else COPIES_VERSION

    @property
    def in_oldest_version(self) -> "PackedModel":
        """The same, as a manifest of the oldest version that can say it."""
        return self.model_copy(update={"format_version": self.oldest_version})

    @property
    def slot_count(self) -> int:
        """How many entries the CRC table has behind its checksums."""
        return sum(site.count for site in self.ffns()) if self.placed else 0

    @property
    def layer_count(self) -> int:
        return 1 + max(site.layer for site in self.sites)

    @property
    def unit_count(self) -> int:
        return sum(site.count for site in self.sites)

    @property
    def low_bit(self) -> bool:
        """Whether any of its units has fewer than 16 bits a value."""
        return any(site.bits < 16 for site in self.sites)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all units, once."""
        return sum(site.length_bytes for site in self.sites)

    @property
    def weights_bytes_16bit(self) -> int:
        """What all units would take at 16 bits a value: what shares of a model are shares of."""
        return sum(site.count * site.values * VALUE_BYTES for site in self.sites)

    def place_of(self, site: Site, copy: int = 0) -> int:
        """Where unit 0 of a site lies in one of the copies, in bytes of the namespace."""
        return site.offset_bytes + copy * self.copy_stride_bytes

    def table_of(self, copy: int = 0) -> Extent:
        """The CRC table beside one of the copies."""
        offset = self.crc_table.offset_bytes + copy * self.copy_stride_bytes
        return self.crc_table.model_copy(update={"offset_bytes": offset})


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
    """How far a pack has come: sites before `next_site` are on the drive with their CRCs.

    Site s of copy c counts as number c * sites + s.
    """

    fingerprint: str
    next_site: Offset


def _seal(payload: bytes, generation: int, version: int = FORMAT_VERSION) -> bytes:
    return _HEADER.pack(_MAGIC, version, len(payload), generation, crc32c(payload)) + payload


def _unseal(data: bytes, what: str, newest: int = FORMAT_VERSION) -> tuple[int, bytes]:
    """Version and payload of a record of any version up to `newest`."""
    if len(data) < _HEADER.size or data[: len(_MAGIC)] != _MAGIC:
        raise FormatError(f"{what}: no packed-model record here (magic missing)")
    _, version, length, _, checksum = _HEADER.unpack_from(data)
    if not FORMAT_VERSION <= version <= newest:
        known = " and ".join(str(number) for number in range(FORMAT_VERSION, newest + 1))
        raise FormatError(
            f"{what}: format version {version}; this version reads {known}. Pack again"
        )
    payload = bytes(data[_HEADER.size : _HEADER.size + length])
    if len(payload) != length or crc32c(payload) != checksum:
        raise FormatError(f"{what}: torn or damaged record (CRC32C does not match)")
    return version, payload


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
    """What older versions could say is said as they said it, byte for byte."""
    unsaid: dict[str, Any] = {}
    if model.copies == 1:
        unsaid |= {"copies": True, "copy_stride_bytes": True}
    unsaid_of_sites = set() if model.extended else {"expert"}
    if not model.low_bit:
        unsaid_of_sites.add("bits")
    if unsaid_of_sites:
        unsaid |= {"sites": {"__all__": unsaid_of_sites}}
    if not model.calibrated:
        unsaid |= {"calibration": True, "placed": True}
    return _seal(model.model_dump_json(exclude=unsaid).encode(), 0, model.format_version)


def decode_manifest(data: bytes) -> PackedModel:
    """Raises FormatError when the bytes are torn, of another version or inconsistent."""
    version, payload = _unseal(data, "manifest", NEWEST_VERSION)
    try:
        model = PackedModel.model_validate_json(payload)
    except ValidationError as error:
        raise FormatError(f"manifest: {error}") from error
    _check_sites(model)
    _check_copies(model, version)
    return model


def _check_sites(model: PackedModel) -> None:
    first_crc = 0
    for index, site in enumerate(model.sites):
        if site.site != index or site.first_crc != first_crc:
            raise FormatError(f"manifest of {model.name}: site {site.name} is out of order")
        if site.offset_bytes % BLOCK_BYTES:
            raise FormatError(f"manifest of {model.name}: site {site.name} is not on a block")
        if site.parts and site.values != sum(prod(part.shape) for part in site.parts):
            raise FormatError(f"manifest of {model.name}: parts of {site.name} do not fill it")
        if site.bits < 16 and site.cols % GROUP:
            raise FormatError(
                f"manifest of {model.name}: rows of {site.cols} values of {site.name} are not "
                f"whole groups of {GROUP}"
            )
        if site.bits == 12 and (model.dtype == "float16" or site.cols > COLS_MAX):
            raise FormatError(
                f"manifest of {model.name}: rows of {site.cols} values of {site.name} in 12 bits, "
                f"which bfloat16 alone has, {COLS_MAX} at most"
            )
        first_crc += site.count
    if model.crc_table.length_bytes != 4 * (first_crc + model.slot_count):
        raise FormatError(f"manifest of {model.name}: CRC table does not cover its units")


def _check_copies(model: PackedModel, version: int) -> None:
    said = f"manifest of {model.name}: {model.copies} copies"
    if not version == model.format_version == model.oldest_version:
        raise FormatError(f"{said} do not go with format version {version}")
    begin = model.crc_table.offset_bytes
    end = max((site.offset_bytes + site.length_bytes for site in model.sites), default=begin)
    if model.copies > 1 and (
        model.copy_stride_bytes % BLOCK_BYTES or model.copy_stride_bytes < end - begin
    ):
        raise FormatError(f"{said}, {model.copy_stride_bytes} bytes apart, lie over each other")


def encode_progress(progress: Progress) -> bytes:
    sealed = _seal(progress.model_dump_json().encode(), progress.next_site)
    return sealed.ljust(BLOCK_BYTES, b"\0")


def decode_progress(data: bytes) -> Progress | None:
    """None when nothing valid was written yet."""
    try:
        return Progress.model_validate_json(_unseal(data, "progress")[1])
    except (FormatError, ValidationError):
        return None


def row_bytes(cols: int, bits: Bits) -> int:
    """Bytes of one row of a unit."""
    if bits == 16:
        return cols * VALUE_BYTES
    return lossless_row_bytes(cols) if bits == 12 else low_bit_row_bytes(cols, bits)


def align_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
