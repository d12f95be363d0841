"""The packed-model records: what is written is read back, and damage never goes unnoticed."""

import json
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csd_protocol.lossless_units import COLS_MAX
from csd_protocol.low_bit_units import GROUP
from csd_protocol.packed import (
    BLOCK_BYTES,
    COPIES_MAX,
    Directory,
    DirectoryEntry,
    Extent,
    FormatError,
    PackedModel,
    Part,
    Progress,
    Role,
    Site,
    UnitKind,
    align_up,
    decode_directory,
    decode_manifest,
    decode_progress,
    directory_slot,
    encode_directory,
    encode_manifest,
    encode_progress,
)
from csd_protocol.unit_table import UnitTable, decode_unit_table

offsets = st.integers(0, 1 << 50)
extents = st.builds(
    Extent,
    offset_bytes=offsets,
    length_bytes=offsets,
    crc32c=st.integers(0, (1 << 32) - 1),
)
entries = st.builds(
    DirectoryEntry,
    model=st.integers(1, 1 << 20),
    name=st.text(max_size=20),
    state=st.sampled_from(["packing", "complete"]),
    fingerprint=st.text("0123456789abcdef", max_size=64),
    extent=extents,
    manifest=extents,
    progress=extents,
)
records = st.builds(
    Directory,
    generation=st.integers(0, 1 << 40),
    models=st.lists(entries, max_size=4).map(tuple),
)


@st.composite
def manifests(draw: st.DrawFn) -> PackedModel:
    sites: list[Site] = []
    for role in draw(st.lists(st.sampled_from(Role), min_size=1, max_size=6)):
        first_crc = sites[-1].first_crc + sites[-1].count if sites else 0
        bits = draw(st.sampled_from([16, 16, 12, 8, 4]))
        rows, cols = draw(st.integers(1, 9)), draw(st.integers(1, 9)) * (1 if bits == 16 else GROUP)
        parts = (Part(name="all", shape=(rows, cols)),) if draw(st.booleans()) else ()
        sites.append(
            Site(
                site=len(sites),
                role=role,
                kind=draw(st.sampled_from(UnitKind)),
                layer=draw(st.integers(-1, 5)),
                expert=draw(st.integers(-1, 3)),
                count=draw(st.integers(1, 1000)),
                rows=rows,
                cols=cols,
                offset_bytes=draw(st.integers(0, 1 << 30)) * BLOCK_BYTES,
                first_crc=first_crc,
                parts=parts,
                bits=bits,
            )
        )
    has_12 = any(site.bits == 12 for site in sites)
    placed = draw(st.booleans())
    neurons = sum(site.count for site in sites if site.role is Role.FFN)
    units = sum(site.count for site in sites)
    table = Extent(offset_bytes=0, length_bytes=4 * (units + neurons * placed))
    copies = draw(st.integers(1, COPIES_MAX))
    end = max(site.offset_bytes + site.length_bytes for site in sites)
    model = PackedModel(
        copies=copies,
        copy_stride_bytes=align_up(end, BLOCK_BYTES) if copies > 1 else 0,
        name=draw(st.text(max_size=20)),
        family="llama",
        config=draw(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5))),
        dtype="bfloat16" if has_12 else draw(st.sampled_from(["float16", "bfloat16"])),
        source="/somewhere",
        fingerprint="00",
        sites=tuple(sites),
        crc_table=table,
        frequencies=draw(st.none() | extents),
        calibration=draw(st.none() | extents),
        placed=placed,
    )
    return model.in_oldest_version


@given(records)
def test_a_directory_is_read_back_from_either_slot(directory: Directory) -> None:
    data = encode_directory(directory)
    assert decode_directory([data, bytes(4096)]) == directory
    assert decode_directory([bytes(4096), data.ljust(1 << 19, b"\0")]) == directory


@given(records, st.lists(entries, max_size=3))
def test_the_later_directory_wins(directory: Directory, models: list[DirectoryEntry]) -> None:
    later = Directory(generation=directory.generation + 1, models=tuple(models))
    slots = {directory_slot(each.generation): encode_directory(each) for each in (directory, later)}
    assert len(slots) == 2
    assert decode_directory([slots[offset] for offset in sorted(slots)]) == later


@given(records, st.data())
def test_a_torn_directory_leaves_the_one_before(directory: Directory, data: st.DataObject) -> None:
    later = encode_directory(Directory(generation=directory.generation + 1))
    length = data.draw(st.integers(0, len(later) - 1))
    torn = later[:length] + b"\0" * (len(later) - length)
    assert decode_directory([encode_directory(directory), torn]) == directory


@given(records, st.data())
def test_one_changed_byte_in_a_directory_is_noticed(
    directory: Directory, data: st.DataObject
) -> None:
    sealed = bytearray(encode_directory(directory))
    # Bytes 16 to 23 repeat the generation for people with a hex editor; the payload has the word.
    position = data.draw(st.integers(0, len(sealed) - 1).filter(lambda at: not 16 <= at < 24))
    sealed[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FormatError, match="directory slot 0"):
        decode_directory([bytes(sealed), bytes(4096)])


def test_a_drive_never_written_has_an_empty_directory() -> None:
    assert decode_directory([bytes(4096), bytes(4096)]) == Directory()


def test_a_directory_larger_than_its_slot_is_refused() -> None:
    record = Extent(offset_bytes=0, length_bytes=0)
    entry = DirectoryEntry(
        model=1,
        name="n" * 6000,
        state="complete",
        fingerprint="",
        extent=record,
        manifest=record,
        progress=record,
    )
    with pytest.raises(FormatError, match=r"directory of 100 models.*Remove a model"):
        encode_directory(Directory(models=(entry,) * 100))


@given(manifests())
def test_a_manifest_is_read_back(model: PackedModel) -> None:
    data = encode_manifest(model)
    assert decode_manifest(data) == model
    assert decode_manifest(data.ljust(align_up(len(data), BLOCK_BYTES), b"\0")) == model
    assert model.weights_bytes_16bit == sum(s.count * s.rows * s.cols * 2 for s in model.sites)
    row_bytes = {
        16: lambda cols: cols * 2,
        12: lambda cols: 64 * ceil((cols * 3 // 2 + 4 * (cols // 128 + 5)) / 64),
        8: lambda cols: cols * 34 // 32,
        4: lambda cols: cols * 20 // 32,
    }
    assert model.weights_bytes == sum(
        s.count * s.rows * row_bytes[s.bits](s.cols) for s in model.sites
    )


@given(manifests(), st.data())
def test_a_torn_manifest_is_noticed(model: PackedModel, data: st.DataObject) -> None:
    sealed = encode_manifest(model)
    with pytest.raises(FormatError, match="manifest"):
        decode_manifest(sealed[: data.draw(st.integers(0, len(sealed) - 1))])


@given(manifests(), st.data())
def test_sites_that_do_not_add_up_are_refused(model: PackedModel, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(model.sites) - 1))
    site = model.sites[index]
    change = data.draw(
        st.sampled_from(
            [
                {"site": site.site + 1},
                {"first_crc": site.first_crc + 1},
                {"count": site.count + 1},
                {"offset_bytes": site.offset_bytes + 2},
                {"parts": (Part(name="all", shape=(site.rows, site.cols + 1)),)},
            ]
        )
    )
    sites = list(model.sites)
    sites[index] = site.model_copy(update=change)
    with pytest.raises(FormatError, match="manifest of"):
        decode_manifest(encode_manifest(model.model_copy(update={"sites": tuple(sites)})))


@given(manifests().filter(lambda model: model.copies > 1))
def test_copies_that_lie_over_each_other_are_refused(model: PackedModel) -> None:
    for stride in (0, BLOCK_BYTES, model.copy_stride_bytes - BLOCK_BYTES):
        end = max(site.offset_bytes + site.length_bytes for site in model.sites)
        if stride < end:
            changed = model.model_copy(update={"copy_stride_bytes": stride})
            with pytest.raises(FormatError, match=r"copies, \d+ bytes apart, lie over each other"):
                decode_manifest(encode_manifest(changed))


@given(manifests())
def test_a_manifest_has_the_oldest_version_that_can_say_it(model: PackedModel) -> None:
    data = bytearray(encode_manifest(model))
    written = data[8]
    older = 3 if model.extended else 1 if model.copies == 1 else 2
    has_12 = any(site.bits == 12 for site in model.sites)
    assert written == (5 if has_12 else 4 if model.calibrated or model.low_bit else older)
    for other in {1, 2, 3, 4, 5} - {written}:
        data[8] = other
        with pytest.raises(FormatError, match=r"do not go with format version"):
            decode_manifest(bytes(data))
    data[8] = 6
    reads = r"version 6; this version reads 1 and 2 and 3 and 4 and 5\. Pack again"
    with pytest.raises(FormatError, match=reads):
        decode_manifest(bytes(data))


@given(manifests())
def test_rows_of_levels_are_whole_groups(model: PackedModel) -> None:
    for site in model.sites:
        if site.bits < 16 and not site.parts:
            odd = site.model_copy(update={"cols": site.cols - 1})
            sites = tuple(odd if other is site else other for other in model.sites)
            with pytest.raises(FormatError, match=r"are not whole groups of 32"):
                decode_manifest(encode_manifest(model.model_copy(update={"sites": sites})))


@given(manifests())
def test_12_bits_are_of_bfloat16_and_of_columns_that_a_patch_can_name(model: PackedModel) -> None:
    first, *others = model.sites
    for dtype, cols in (("float16", GROUP), ("bfloat16", COLS_MAX + GROUP)):
        wrong = first.model_copy(update={"cols": cols, "bits": 12, "parts": ()})
        changed = model.model_copy(update={"dtype": dtype, "sites": (wrong, *others)})
        with pytest.raises(FormatError, match=r"in 12 bits, which bfloat16 alone has"):
            decode_manifest(encode_manifest(changed.in_oldest_version))


def test_another_format_version_says_so() -> None:
    data = bytearray(encode_directory(Directory(generation=4)))
    data[8] = 9
    with pytest.raises(FormatError, match=r"format version 9; this version reads 1\. Pack again"):
        decode_directory([bytes(data), bytes(64)])


@given(st.text("0123456789abcdef", max_size=64), st.integers(0, 1 << 30))
def test_progress_is_read_back_from_one_block(fingerprint: str, next_site: int) -> None:
    record = Progress(fingerprint=fingerprint, next_site=next_site)
    data = encode_progress(record)
    assert len(data) == BLOCK_BYTES
    assert decode_progress(data) == record


@given(st.binary(max_size=200))
def test_anything_else_is_no_progress(data: bytes) -> None:
    assert decode_progress(data) is None


def test_fields_of_a_later_version_are_refused() -> None:
    directory = json.loads(Directory().model_dump_json()) | {"surprise": 1}
    with pytest.raises(ValueError, match="surprise"):
        Directory.model_validate(directory)


@given(manifests(), st.integers(0, 1 << 32))
def test_a_unit_table_is_read_back(model: PackedModel, seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots = {site.site: rng.permutation(site.count).astype(np.uint32) for site in model.ffns()}
    crcs = rng.integers(0, 1 << 32, model.unit_count, np.uint32)
    data = UnitTable(crcs, slots if model.placed else {}).encode()
    assert len(data) == model.crc_table.length_bytes
    read = decode_unit_table(model, data)
    assert np.array_equal(read.crcs, crcs)
    assert read.slots.keys() == (slots.keys() if model.placed else set())
    assert all(np.array_equal(read.slots[site], slots[site]) for site in read.slots)


@given(manifests(), st.data())
def test_slots_that_are_no_order_are_refused(model: PackedModel, data: st.DataObject) -> None:
    if not model.slot_count:
        return
    slots = {site.site: np.arange(site.count, dtype=np.uint32) for site in model.ffns()}
    crcs = np.zeros(model.unit_count, np.uint32)
    site = data.draw(st.sampled_from(sorted(slots)))
    unit = data.draw(st.integers(0, slots[site].size - 1))
    slots[site][unit] = data.draw(st.integers(0, (1 << 32) - 1).filter(lambda slot: slot != unit))
    with pytest.raises(FormatError, match="has slots twice, or none"):
        decode_unit_table(model, UnitTable(crcs, slots).encode())
