"""The drive's directory of models: opening, removing, frequencies, damage, space."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from csd_protocol.packed import (
    MODEL_ALIGN_BYTES,
    MODELS_OFFSET_BYTES,
    Directory,
    DirectoryEntry,
    Extent,
    PackedModel,
    Role,
)
from host_client.model.catalog import (
    find_free,
    list_models,
    open_model,
    read_directory,
    read_frequencies,
    read_units,
    remove_model,
    store_frequencies,
)
from host_client.model.errors import DamagedRecord, DriveTooSmall, NotPacked
from host_client.model.packer import pack
from host_client.model.safetensors_folder import SafetensorsFolder


@pytest.fixture
def packed(tiny_folder: Path, ram_drive: Any) -> PackedModel:
    with SafetensorsFolder(tiny_folder) as checkpoint:
        return pack(checkpoint, ram_drive, "tiny")


def test_an_empty_drive_has_no_models(ram_drive: Any) -> None:
    assert list_models(ram_drive) == ()
    with pytest.raises(NotPacked, match=r"no model 'tiny' on the drive \(models on it: none\)"):
        open_model(ram_drive, "tiny")


def test_a_removed_model_is_gone_and_its_blocks_are_free(
    packed: PackedModel, ram_drive: Any
) -> None:
    remove_model(ram_drive, "tiny")
    assert list_models(ram_drive) == ()
    assert not any(ram_drive.data[MODELS_OFFSET_BYTES:])
    with pytest.raises(NotPacked):
        remove_model(ram_drive, "tiny")


def test_units_by_range(packed: PackedModel, ram_drive: Any) -> None:
    site = packed.find(Role.FFN, 1)
    whole = read_units(ram_drive, site, 0, site.count)
    assert whole.shape == (96, 3, 64)
    assert np.array_equal(read_units(ram_drive, site, 17, 40), whole[17:40])


def test_frequencies_are_kept_and_replaced(packed: PackedModel, ram_drive: Any) -> None:
    assert read_frequencies(ram_drive, packed) is None
    for tokens in (10, 20, 30):
        counts = np.arange(192, dtype=np.uint32).reshape(2, 96) * tokens
        stored = store_frequencies(ram_drive, "tiny", counts, tokens)
        assert open_model(ram_drive, "tiny") == (1, stored)
        assert stored.frequency_tokens == tokens
        kept = read_frequencies(ram_drive, stored)
        assert kept is not None
        assert np.array_equal(kept, counts)
        assert stored.sites == packed.sites


def test_frequencies_of_another_shape_are_refused(packed: PackedModel, ram_drive: Any) -> None:
    with pytest.raises(ValueError, match=r"\(2, 95\), not \(2, 96\)"):
        store_frequencies(ram_drive, "tiny", np.zeros((2, 95), np.uint32), 1)


def test_a_crash_while_storing_frequencies_leaves_the_old_ones(
    packed: PackedModel, ram_drive: Any
) -> None:
    old = np.full((2, 96), 5, np.uint32)
    store_frequencies(ram_drive, "tiny", old, 7)
    for allowed in range(3):
        ram_drive.writes_left = allowed
        with pytest.raises(ConnectionError):
            store_frequencies(ram_drive, "tiny", old * 2, 14)
        ram_drive.forget()
        _, model = open_model(ram_drive, "tiny")
        kept = read_frequencies(ram_drive, model)
        assert kept is not None
        assert (model.frequency_tokens, int(kept[1, 95])) == (7, 5)


def test_a_torn_directory_slot_leaves_the_other(packed: PackedModel, ram_drive: Any) -> None:
    generation = read_directory(ram_drive).generation
    slot = (generation % 2) << 19
    ram_drive.data[slot + 40] ^= 0xFF
    directory = read_directory(ram_drive)
    assert directory.generation == generation - 1
    assert directory.models[0].state == "packing"


def test_a_damaged_directory_is_not_taken_for_an_empty_one(
    packed: PackedModel, ram_drive: Any
) -> None:
    for slot in (0, 1 << 19):
        ram_drive.data[slot + 40] ^= 0xFF
    with pytest.raises(DamagedRecord, match=r"directory slot 0.*Format the drive"):
        list_models(ram_drive)


def test_a_damaged_manifest_is_named(packed: PackedModel, ram_drive: Any) -> None:
    entry = list_models(ram_drive)[0]
    ram_drive.data[entry.manifest.offset_bytes + 100] ^= 1
    with pytest.raises(DamagedRecord, match=r"manifest of tiny at byte \d+.*pack it again"):
        open_model(ram_drive, "tiny")


@st.composite
def directories(draw: st.DrawFn) -> Directory:
    """Models behind each other with gaps between them, entered in any order."""
    offset = MODELS_OFFSET_BYTES
    extents = []
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), max_size=6)):
        offset += gap * MODEL_ALIGN_BYTES
        extents.append(Extent(offset_bytes=offset, length_bytes=length * MODEL_ALIGN_BYTES))
        offset += length * MODEL_ALIGN_BYTES
    entries = [_entry(number, extent) for number, extent in enumerate(extents, 1)]
    return Directory(models=tuple(draw(st.permutations(entries))))


def _entry(number: int, extent: Extent) -> DirectoryEntry:
    record = Extent(offset_bytes=0, length_bytes=0)
    return DirectoryEntry(
        model=number,
        name=f"m{number}",
        state="complete",
        fingerprint="",
        extent=extent,
        manifest=record,
        progress=record,
    )


@given(directories(), st.integers(1, 6), st.integers(40, 60))
def test_free_space_is_free_and_the_first(
    directory: Directory, length_mib: int, capacity_mib: int
) -> None:
    taken = [
        (entry.extent.offset_bytes >> 20, entry.extent.length_bytes >> 20)
        for entry in directory.models
    ]
    fits = [
        start
        for start in range(1, capacity_mib - length_mib + 1)
        if all(start + length_mib <= at or at + size <= start for at, size in taken)
    ]
    assume(all(at + size <= capacity_mib for at, size in taken))
    if fits:
        assert find_free(directory, capacity_mib << 20, length_mib << 20, "x") == fits[0] << 20
        return
    with pytest.raises(DriveTooSmall, match=f"{length_mib << 20} bytes"):
        find_free(directory, capacity_mib << 20, length_mib << 20, "x")
