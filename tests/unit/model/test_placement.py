"""Placing neurons: the same units elsewhere, whatever interrupts it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csd_protocol.crc32c import crc32c_units
from csd_protocol.packed import MODEL_ALIGN_BYTES, Bits, PackedModel, Role, Site
from host_client.model import layout
from host_client.model.calibration_record import Calibration, calibration_bytes
from host_client.model.catalog import (
    list_models,
    open_model,
    read_calibration,
    read_frequencies,
    read_unit_table,
    read_units,
    store_frequencies,
)
from host_client.model.errors import DamagedRecord, DriveTooSmall, NotCalibrated, PackedBefore
from host_client.model.packer import pack
from host_client.model.placement import place_units
from host_client.model.safetensors_folder import SafetensorsFolder

LAYERS, NEURONS = 2, 96
COUNTS = np.arange(LAYERS * NEURONS, dtype=np.uint32).reshape(LAYERS, NEURONS)
DRIVE_BYTES = 12 << 20


def calibration(seed: int = 1) -> Calibration:
    rng = np.random.default_rng(seed)
    return Calibration(
        weights=rng.random(LAYERS, np.float32),
        dropped=np.sort(rng.random((LAYERS, NEURONS + 1), np.float32), axis=1)[:, ::-1],
        order=rng.permuted(np.tile(np.arange(NEURONS, dtype=np.uint32), (LAYERS, 1)), axis=1),
    )


def units_of(drive: Any, model: PackedModel, site: Site, copy: int = 0) -> np.ndarray:
    """All units by number, as a reader has them that looks the slots up."""
    lying = read_units(drive, site, 0, site.count, model.place_of(site, copy))
    slots = read_unit_table(drive, model, copy).slots.get(site.site)
    return lying if slots is None else lying[slots]


def reader(drive: Any) -> Callable[[Site, int, int], np.ndarray]:
    _, model = open_model(drive, "tiny")
    return lambda site, start, stop: units_of(drive, model, site)[start:stop]


def place(drive: Any, told: Callable[..., None] = lambda *_: None, **options: Any) -> PackedModel:
    return place_units(drive, "tiny", reader(drive), told, **options)


@pytest.fixture
def pack_tiny(tiny_folder: Path, make_drive: Any) -> Callable[..., Any]:
    def packed(copies: int = 1, calibrated: bool = True, bits: Bits = 16) -> Any:
        drive = make_drive(DRIVE_BYTES)
        with SafetensorsFolder(tiny_folder) as checkpoint:
            pack(checkpoint, drive, "tiny", bits=bits, copies=copies)
        if calibrated:
            store_frequencies(drive, "tiny", COUNTS, 7, calibration())
        drive.forget()
        return drive

    return packed


def check(drive: Any, model: PackedModel, expected: dict[int, np.ndarray]) -> None:
    table = read_unit_table(drive, model)
    for copy in range(model.copies):
        for site in model.sites:
            units = units_of(drive, model, site, copy)
            assert np.array_equal(units, expected[site.site])
            rows = units.reshape(site.count, -1).view(np.uint8)
            assert np.array_equal(crc32c_units(rows), table.crcs_of(site))
    counts = read_frequencies(drive, model)
    assert counts is not None
    assert np.array_equal(counts, COUNTS)
    assert model.frequency_tokens == 7


@pytest.mark.parametrize("copies, bits", [(1, 16), (2, 16), (1, 8), (2, 4)])
def test_units_lie_in_the_calibrated_order_and_are_the_same(
    pack_tiny, copies: int, bits: Bits
) -> None:
    drive = pack_tiny(copies, bits=bits)
    identifier, before = open_model(drive, "tiny")
    expected = {site.site: units_of(drive, before, site) for site in before.sites}
    (old,) = list_models(drive)
    told: list[tuple[int, int, str]] = []
    placed = place(drive, lambda *step: told.append(step))
    assert open_model(drive, "tiny") == (identifier, placed)
    assert (placed.placed, placed.fingerprint) == (True, before.fingerprint)
    assert [site.bits for site in placed.sites] == [site.bits for site in before.sites]
    check(drive, placed, expected)
    for layer, order in enumerate(calibration().order):
        site = placed.find(Role.FFN, layer)
        lying = read_units(drive, site, 0, site.count)
        assert np.array_equal(lying, expected[site.site][order])
    (new,) = list_models(drive)
    assert new.extent != old.extent
    assert not any(drive.data[old.extent.offset_bytes :][: old.extent.length_bytes])
    assert told[-1][:2] == (copies * placed.weights_bytes,) * 2


def test_what_lies_so_already_is_not_written_again(pack_tiny) -> None:
    drive = pack_tiny()
    placed = place(drive)
    drive.forget()
    assert place(drive) == placed
    assert not drive.written
    store_frequencies(drive, "tiny", COUNTS, 7, calibration(2))
    again = place(drive)
    order = calibration(2).order[0]
    slots = read_unit_table(drive, again).slots[again.find(Role.FFN, 0).site]
    assert np.array_equal(np.argsort(slots), order)


@pytest.mark.parametrize("copies", [1, 2])
def test_a_drive_that_goes_away_leaves_old_or_new_and_placing_goes_on(
    pack_tiny, copies: int
) -> None:
    drive = pack_tiny(copies)
    _, before = open_model(drive, "tiny")
    expected = {site.site: units_of(drive, before, site) for site in before.sites}
    whole = pack_tiny(copies)
    place(whole, save_every_bytes=1)
    for allowed in range(0, len(whole.written), 3):
        drive = pack_tiny(copies)
        drive.writes_left = allowed
        with pytest.raises(ConnectionError):
            place(drive, save_every_bytes=1)
        drive.forget()
        _, model = open_model(drive, "tiny")
        assert model.placed == (allowed >= len(whole.written))
        check(drive, model, expected)
        check(drive, place(drive, save_every_bytes=1), expected)
        assert [entry.name for entry in list_models(drive)] == ["tiny"]
    assert len(drive.written) < len(whole.written) // 2  # the last one went on late


def test_a_placement_by_another_calibration_begins_anew(pack_tiny) -> None:
    drive = pack_tiny()
    drive.writes_left = 30
    with pytest.raises(ConnectionError):
        place(drive, save_every_bytes=1)
    drive.forget()
    assert len(list_models(drive)) == 2
    store_frequencies(drive, "tiny", COUNTS, 7, calibration(2))
    placed = place(drive)
    assert len(list_models(drive)) == 1
    slots = read_unit_table(drive, placed).slots[placed.find(Role.FFN, 1).site]
    assert np.array_equal(np.argsort(slots), calibration(2).order[1])


def test_what_was_never_calibrated_and_a_full_drive_are_refused(pack_tiny) -> None:
    drive = pack_tiny(calibrated=False)
    with pytest.raises(NotCalibrated, match=r"tiny on the drive was never calibrated.*Run `csd"):
        place(drive)
    drive = pack_tiny(4)
    (entry,) = list_models(drive)
    drive.capacity_bytes = entry.extent.offset_bytes + entry.extent.length_bytes
    with pytest.raises(DriveTooSmall, match=r"tiny \(being placed\) in 4 copies needs"):
        place(drive)
    assert not drive.written


# ---- the record ----------------------------------------------------------------------------------


def test_a_calibration_is_kept_and_replaced_beside_the_frequencies(pack_tiny) -> None:
    drive = pack_tiny(calibrated=False)
    _, model = open_model(drive, "tiny")
    assert (read_calibration(drive, model), model.format_version) == (None, 1)
    for seed in (1, 2, 3):
        stored = store_frequencies(drive, "tiny", COUNTS * seed, seed, calibration(seed))
        assert open_model(drive, "tiny") == (1, stored)
        assert stored.format_version == 4
        kept = read_calibration(drive, stored)
        assert kept is not None
        for part in ("weights", "dropped", "order"):
            assert np.array_equal(getattr(kept, part), getattr(calibration(seed), part))
    alone = store_frequencies(drive, "tiny", COUNTS, 9)
    assert (alone.calibration, alone.frequency_tokens) == (stored.calibration, 9)


def test_a_crash_while_storing_leaves_the_old_calibration(pack_tiny) -> None:
    drive = pack_tiny()
    for allowed in range(4):
        drive.writes_left = allowed
        with pytest.raises(ConnectionError):
            store_frequencies(drive, "tiny", COUNTS, 8, calibration(2))
        drive.forget()
        _, model = open_model(drive, "tiny")
        kept = read_calibration(drive, model)
        assert kept is not None
        assert np.array_equal(kept.order, calibration().order)


def test_a_damaged_calibration_is_named(pack_tiny) -> None:
    drive = pack_tiny()
    _, model = open_model(drive, "tiny")
    drive.data[model.calibration.offset_bytes + 9] ^= 1
    with pytest.raises(DamagedRecord, match="calibration of tiny at byte"):
        read_calibration(drive, model)


@pytest.mark.parametrize(
    "part, value, words",
    [
        ("weights", np.full(LAYERS, np.nan, np.float32), "no numbers"),
        ("weights", np.ones(LAYERS + 1, np.float32), "weights of 3 layers, not 2"),
        ("dropped", np.full((LAYERS, NEURONS + 1), -1, np.float32), "negative"),
        ("order", np.zeros((LAYERS, NEURONS), np.uint32), "a neuron twice"),
        ("order", np.zeros((LAYERS, NEURONS - 1), np.uint32), r"\(2, 95\) units, not \(2, 96\)"),
    ],
)
def test_a_calibration_that_nobody_measured_is_refused(pack_tiny, part, value, words) -> None:
    drive = pack_tiny(calibrated=False)
    made = calibration()
    parts = {name: getattr(made, name) for name in ("weights", "dropped", "order")}
    with pytest.raises(ValueError, match=words):
        store_frequencies(drive, "tiny", COUNTS, 7, Calibration(**(parts | {part: value})))
    assert not drive.written


def test_a_model_packed_before_has_no_room_but_its_frequencies(pack_tiny, monkeypatch) -> None:
    def frequencies_alone(sites: Any) -> tuple[int, int]:
        return measured(sites)[0], 0

    measured = layout._measured_bytes
    monkeypatch.setattr(layout, "_measured_bytes", frequencies_alone)
    drive = pack_tiny(calibrated=False)
    monkeypatch.undo()
    assert calibration_bytes(LAYERS, NEURONS) < MODEL_ALIGN_BYTES
    with pytest.raises(PackedBefore, match=r"without room.*pack it again"):
        store_frequencies(drive, "tiny", COUNTS, 7, calibration())
    stored = store_frequencies(drive, "tiny", COUNTS, 7)
    assert np.array_equal(read_frequencies(drive, stored), COUNTS)
    assert stored.format_version == 1


def test_a_pack_begun_by_an_earlier_version_begins_anew(
    tiny_folder: Path, make_drive: Any, monkeypatch
) -> None:
    """Its sites lie elsewhere in an extent that may be as long."""
    measured = layout._measured_bytes
    drive = make_drive(DRIVE_BYTES)
    with SafetensorsFolder(tiny_folder) as checkpoint:
        monkeypatch.setattr(layout, "_measured_bytes", lambda sites: (measured(sites)[0], 0))
        drive.writes_left = 20
        with pytest.raises(ConnectionError):
            pack(checkpoint, drive, "tiny", save_every_bytes=1)
        monkeypatch.undo()
        drive.forget()
        model = pack(checkpoint, drive, "tiny", save_every_bytes=1)
        whole = make_drive(DRIVE_BYTES)
        pack(checkpoint, whole, "tiny")
    assert model.sites == open_model(whole, "tiny")[1].sites
    for site in model.sites:
        assert np.array_equal(units_of(drive, model, site), units_of(whole, model, site))
