"""Packing in several copies: where they lie, what they hold, and going on after an interruption."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csd_protocol.crc32c import crc32c
from csd_protocol.packed import (
    BLOCK_BYTES,
    COPIES_MAX,
    MODEL_ALIGN_BYTES,
    PackedModel,
    align_up,
)
from host_client.model.catalog import (
    list_models,
    open_model,
    read_unit_table,
    read_units,
    remove_model,
    store_frequencies,
)
from host_client.model.errors import DifferentModel, DriveTooSmall, UnsupportedModel
from host_client.model.packer import pack
from host_client.model.safetensors_folder import SafetensorsFolder


def pack_folder(folder: Path, drive: Any, copies: int = 2, **options: Any) -> PackedModel:
    with SafetensorsFolder(folder) as checkpoint:
        return pack(checkpoint, drive, "tiny", copies=copies, **options)


@pytest.mark.parametrize("copies", [2, COPIES_MAX])
def test_every_copy_holds_the_same_units_and_checksums(
    tiny_folder: Path, make_drive: Any, copies: int
) -> None:
    once, drive = make_drive(), make_drive()
    single = pack_folder(tiny_folder, once, 1)
    seen: list[tuple[int, int, str]] = []
    model = pack_folder(tiny_folder, drive, copies, progress=lambda *report: seen.append(report))
    assert (model.copies, open_model(drive, "tiny")) == (copies, (1, model))
    assert model.weights_bytes == single.weights_bytes
    for copy in range(copies):
        assert np.array_equal(
            read_unit_table(drive, model, copy).crcs, read_unit_table(once, single).crcs
        )
        for site, other in zip(model.sites, single.sites, strict=True):
            units = read_units(drive, site, 0, site.count, model.place_of(site, copy))
            assert np.array_equal(units, read_units(once, other, 0, other.count))
    assert seen[-1][:2] == (copies * model.weights_bytes, copies * model.weights_bytes)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_the_extent_holds_all_copies_and_they_do_not_touch(
    tiny_folder: Path, ram_drive: Any
) -> None:
    model = pack_folder(tiny_folder, ram_drive)
    (entry,) = list_models(ram_drive)
    last = model.sites[-1]
    ends = [
        model.place_of(last, copy) + align_up(last.length_bytes, BLOCK_BYTES) for copy in (0, 1)
    ]
    assert ends[0] <= model.table_of(1).offset_bytes
    assert ends[1] <= entry.extent.offset_bytes + entry.extent.length_bytes
    assert model.copy_stride_bytes % MODEL_ALIGN_BYTES == 0
    remove_model(ram_drive, "tiny")
    assert not any(ram_drive.data[entry.extent.offset_bytes :])


def test_one_copy_is_packed_as_ever(tiny_folder: Path, ram_drive: Any) -> None:
    """So that what knows format version 1 only reads it."""
    pack_folder(tiny_folder, ram_drive, 1)
    (entry,) = list_models(ram_drive)
    data = ram_drive.data[entry.manifest.offset_bytes :][: entry.manifest.length_bytes]
    assert int.from_bytes(data[8:12], "little") == 1
    said = json.loads(data[28:])
    assert "copies" not in said
    assert "copy_stride_bytes" not in said


def test_frequencies_are_kept_beside_copies(tiny_folder: Path, ram_drive: Any) -> None:
    model = pack_folder(tiny_folder, ram_drive)
    for counted in (1, 2):
        store_frequencies(ram_drive, "tiny", np.full((2, 96), counted, np.uint32), counted)
    _, again = open_model(ram_drive, "tiny")
    assert (again.copies, again.sites) == (2, model.sites)
    assert crc32c(read_unit_table(ram_drive, again, 1).encode()) == again.crc_table.crc32c


def test_an_interrupted_pack_goes_on_in_any_copy(tiny_folder: Path, make_drive: Any) -> None:
    whole = make_drive()
    model = pack_folder(tiny_folder, whole, save_every_bytes=1)
    for allowed in range(0, len(whole.written), 5):
        drive = make_drive()
        drive.writes_left = allowed
        with pytest.raises(ConnectionError):
            pack_folder(tiny_folder, drive, save_every_bytes=1)
        drive.forget()
        pack_folder(tiny_folder, drive, save_every_bytes=1)
        assert drive.data == whole.data
    first = {model.place_of(site) for site in model.sites}
    written = {offset for offset, _ in drive.written}  # by the last one, late in the second copy
    assert not first & written


def test_another_number_of_copies_is_another_model(tiny_folder: Path, ram_drive: Any) -> None:
    pack_folder(tiny_folder, ram_drive, 1)
    with pytest.raises(DifferentModel, match=r"another number of copies.*or replace it"):
        pack_folder(tiny_folder, ram_drive)
    assert pack_folder(tiny_folder, ram_drive, replace=True).copies == 2
    ram_drive.forget()
    pack_folder(tiny_folder, ram_drive)
    assert ram_drive.written == []


def test_a_drive_with_room_for_one_copy_only(tiny_folder: Path, make_drive: Any) -> None:
    drive = make_drive(2 << 20)
    with pytest.raises(DriveTooSmall, match=r"tiny in 2 copies needs 2\.0 MiB \(\d+ bytes\)"):
        pack_folder(tiny_folder, drive)
    assert drive.written == []
    assert pack_folder(tiny_folder, drive, 1).copies == 1


@pytest.mark.parametrize("copies", [0, COPIES_MAX + 1])
def test_no_such_number_of_copies(tiny_folder: Path, ram_drive: Any, copies: int) -> None:
    with pytest.raises(UnsupportedModel, match=f"{copies} copies; a model has 1 to {COPIES_MAX}"):
        pack_folder(tiny_folder, ram_drive, copies)
