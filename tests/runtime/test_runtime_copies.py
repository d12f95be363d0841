"""Units that the flash has lost come from another copy, and nobody sees it in the output."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from csd_device.errors import UnrecoveredRead
from csd_device.ftl import Ftl
from csd_device.nand.media import Media
from csd_device.nand.passing import PassingMedia
from csd_protocol.packed import PackedModel, Role
from host_client.calibrate.predictor import read_down_norms
from host_client.calibrate.preparation import build_predictor
from host_client.cli import reports
from host_client.runtime.copies import UnitsLost
from host_client.runtime.plain_reads import PlainReads

SECTOR = 4096
NAME = "untied"  # its embedding and its output head are sites of their own


class Lossy(PassingMedia):
    """Media that cannot give back some sectors."""

    def __init__(self, inner: Media) -> None:
        super().__init__(inner)
        self.lost: set[int] = set()  # PSAs

    def gather(self, pieces: Any, out: np.ndarray) -> Any:
        ends = (pieces.starts + pieces.lengths - 1) // SECTOR
        for first, last in zip((pieces.starts // SECTOR).tolist(), ends.tolist(), strict=True):
            bad = self.lost.intersection(range(first, last + 1))
            if bad:
                raise UnrecoveredRead(f"sector {min(bad)} cannot be read", np.array(sorted(bad)))
        return self.inner.gather(pieces, out)


class Flash:
    """Loses units of a packed model, and gives them back."""

    def __init__(self) -> None:
        self.media: list[Lossy] = []
        self.ftls: list[Ftl] = []

    def lose(self, packed: PackedModel, role: Role, layer: int, unit: int, copy: int = 0) -> None:
        site = packed.find(role, layer)
        place = packed.place_of(site, copy) + unit * site.unit_bytes
        self.media[-1].lost.add(int(self.ftls[-1].table[place // SECTOR]) - 1)

    def heal(self) -> None:
        self.media[-1].lost.clear()


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Flash:
    made = Flash()
    genuine = Ftl.open

    def open_lossy(directory: Any, config: Any, wrap: Any, begin: Any) -> Ftl:
        def wrap_lossy(media: Any, superblocks: Any) -> Any:
            made.media.append(Lossy(media))
            return wrap(made.media[-1], superblocks)

        made.ftls.append(genuine(directory, config, wrap_lossy, begin))
        return made.ftls[-1]

    monkeypatch.setattr(Ftl, "open", open_lossy)
    return made


SCATTERED = (
    (Role.EMBED, -1, 17),
    (Role.NORMS, 1, 0),
    (Role.KV, 0, 0),
    (Role.HEADS, 1, 0),
    (Role.FFN, 0, 3),
    (Role.FFN, 2, 129),
    (Role.FINAL_NORM, -1, 0),
    (Role.LM_HEAD, -1, 200),
)


def lose_all(flash: Flash, packed: PackedModel, copy: int = 0) -> None:
    for role, layer, unit in SCATTERED:
        flash.lose(packed, role, layer, unit, copy)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_lost_units_of_every_kind_change_nothing(
    make_lab, flash: Flash, tokens_of, greedy, share: float, cache_bytes: int
) -> None:
    lab = make_lab(copies=2, unit_cache_bytes=cache_bytes)
    _, packed = lab.packed(NAME)
    lose_all(flash, packed)
    ids = tokens_of(lab, NAME, 5)
    model = lab.open(NAME, lab.budget(NAME, share))
    ids[0, 0] = 17  # an embedding row that is lost
    assert greedy(model, ids) == greedy(lab.zoo.dense(NAME), ids)
    assert model.csd.copies.recovered_units >= len(SCATTERED)
    assert model.csd.tally.units_from_copies >= len(SCATTERED)
    model.csd.close()
    assert lab.leases == 0


def test_units_lost_while_it_runs_move_on_at_once_and_for_good(
    make_lab, flash: Flash, tokens_of, greedy
) -> None:
    lab = make_lab(copies=2)
    model = lab.open(NAME, lab.budget(NAME, 0.0))
    ids = tokens_of(lab, NAME, 5)
    expected = greedy(lab.zoo.dense(NAME), ids)
    assert greedy(model, ids) == expected
    assert model.csd.copies.recovered_units == 0
    for role, layer, unit in SCATTERED[4:6]:
        flash.lose(model.csd.packed, role, layer, unit)
    for _ in range(2):
        assert greedy(model, ids) == expected
        failed = lab.drive.log_page(2)["media_errors"]
    recovered = model.csd.copies.recovered_units
    assert recovered >= 2
    assert greedy(model, ids) == expected
    assert lab.drive.log_page(2)["media_errors"] == failed  # nothing fails twice
    flash.lose(model.csd.packed, Role.FFN, 1, 5, copy=1)  # which nobody reads
    assert greedy(model, ids) == expected
    assert model.csd.copies.recovered_units == recovered


def test_each_copy_may_have_lost_other_units(make_lab, flash: Flash, tokens_of, greedy) -> None:
    lab = make_lab(copies=2)
    model = lab.open(NAME, lab.budget(NAME, 0.0))
    flash.lose(model.csd.packed, Role.FFN, 1, 5, copy=0)
    flash.lose(model.csd.packed, Role.FFN, 1, 90, copy=1)
    ids = tokens_of(lab, NAME, 5)
    assert greedy(model, ids) == greedy(lab.zoo.dense(NAME), ids)


@pytest.mark.parametrize("copies", [1, 2])
def test_what_no_copy_has_stops_the_run_by_name_and_nothing_stays_leased(
    make_lab, flash: Flash, tokens_of, greedy, copies: int
) -> None:
    lab = make_lab(copies=copies)
    model = lab.open(NAME, lab.budget(NAME, 0.0))
    ids = tokens_of(lab, NAME, 5)
    for copy in range(copies):
        flash.lose(model.csd.packed, Role.FFN, 2, 77, copy)
    with pytest.raises(UnitsLost) as stopped:
        greedy(model, ids)
    ((site, units),) = stopped.value.units.items()
    assert (stopped.value.model, site.name) == (NAME, "layers.2.ffn")
    assert 77 in units
    said = str(stopped.value)
    assert re.search(rf"{NAME} has lost units [\d, ]*77", said)
    assert "Unrecovered Read Error (2/81h)" in said
    assert ("its only copy" in said, "all of its 2 copies" in said) == (copies == 1, copies == 2)
    assert ("--copies 2" in said) == (copies == 1)
    model.csd.engine.abandon()
    assert lab.leases == 0
    flash.heal()
    assert greedy(model, ids) == greedy(lab.zoo.dense(NAME), ids)


def test_bit_errors_beyond_the_code_change_no_token(make_lab, tokens_of, greedy) -> None:
    """Every sector takes retries at this rate, and some are lost in the one or the other copy."""
    lab = make_lab(copies=2)
    model = lab.open(NAME, lab.budget(NAME, 0.0))
    ids = tokens_of(lab, NAME, 5)
    model.csd.engine.abandon()
    lab.drive.set_faults("bit_errors", {"rate": 0.132}, seed=3)
    assert greedy(model, ids) == greedy(lab.zoo.dense(NAME), ids)
    assert model.csd.copies.recovered_units > 0
    counters = lab.drive.faults()["counters"]
    assert min(counters["retried_sectors"], counters["uncorrectable_sectors"]) > 0
    lab.drive.clear_faults()


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_kept_fraction_is_the_same_with_lost_units(
    make_lab, flash: Flash, tokens_of, greedy, share: float
) -> None:
    lab = make_lab(copies=2)
    _, packed = lab.packed(NAME)
    lab.drive.load_program(
        0, build_predictor(lab.drive, packed, "shadow", lambda done, total: None)
    )
    ids = tokens_of(lab, NAME, 5)
    budget = lab.budget(NAME, share)
    model = lab.open(NAME, budget, 0.5, recent="50%")
    assert (model.csd.plan.recent_units > 0) == (share > 0.5)
    expected = greedy(model, ids)
    model.csd.close()
    for unit in range(0, 130, 9):
        flash.lose(packed, Role.FFN, 1, unit)
    model = lab.open(NAME, budget, 0.5, recent="50%")
    assert greedy(model, ids) == expected
    assert model.csd.copies.recovered_units > 0


def test_a_lost_crc_table_has_a_copy(make_lab, flash: Flash, tokens_of, greedy) -> None:
    lab = make_lab(copies=2)
    _, packed = lab.packed(NAME)
    table = packed.table_of(0).offset_bytes // SECTOR
    flash.media[-1].lost.add(int(flash.ftls[-1].table[table]) - 1)
    ids = tokens_of(lab, NAME, 5)
    assert greedy(lab.open(NAME), ids) == greedy(lab.zoo.dense(NAME), ids)


def test_predictors_are_built_around_lost_units(make_lab, flash: Flash) -> None:
    lab = make_lab(copies=2)
    _, packed = lab.packed(NAME)
    expected = read_down_norms(lab.drive, packed)
    flash.lose(packed, Role.FFN, 1, 40)
    assert np.array_equal(read_down_norms(lab.drive, packed), expected)
    flash.lose(packed, Role.FFN, 1, 40, copy=1)
    with pytest.raises(UnitsLost, match=r"units? .*40.* of layers\.1\.ffn"):
        read_down_norms(lab.drive, packed)


def test_verify_finds_all_damage_and_says_what_is_lost(make_lab, flash: Flash) -> None:
    lab = make_lab(copies=2)
    _, packed = lab.packed(NAME)
    seen: list[tuple[int, int]] = []
    verified = PlainReads(lab.drive, packed).verify(lambda *step: seen.append(step))
    assert verified == []
    assert seen[-1] == (2 * packed.weights_bytes, 2 * packed.weights_bytes)
    flash.lose(packed, Role.FFN, 1, 40)
    flash.lose(packed, Role.KV, 0, 0, copy=1)
    ffn, kv = packed.find(Role.FFN, 1), packed.find(Role.KV, 0)
    damage = PlainReads(lab.drive, packed).verify(lambda *_: None)
    assert [(part.site, part.copy) for part in damage] == [(ffn, 0), (kv, 1)]
    assert 40 in damage[0].units
    assert damage[0].units.size <= SECTOR // ffn.unit_bytes + 2
    report = reports.verify_object(packed, damage)
    assert (report["lost"], report["damaged_units"]) == ([], damage[0].units.size + 1)
    assert "another copy has each of them" in reports.verify_text(report)
    flash.lose(packed, Role.KV, 0, 0)
    report = reports.verify_object(packed, PlainReads(lab.drive, packed).verify(lambda *_: None))
    assert report["lost"] == [{"site": kv.name, "layer": 0, "units": [0]}]
    assert "lost in every copy: 1 units" in reports.verify_text(report)


def test_bytes_that_only_the_crc_tells_are_recovered_too(make_lab, tokens_of, greedy) -> None:
    """A bit turns over in the NAND's file; the drive's own check finds it (2/82h)."""
    lab = make_lab(copies=2)
    model = lab.open(NAME, lab.budget(NAME, 0.0))
    site = model.csd.packed.find(Role.FFN, 1)
    data = lab.drive.read(site.offset_bytes + 11 * site.unit_bytes, site.unit_bytes)
    with lab.image.open("r+b") as file:
        place = file.read(64 << 20).find(data)  # the first copy was written first
        file.seek(place)
        file.write(bytes([data[0] ^ 1]))
    ids = tokens_of(lab, NAME, 5)
    with torch.inference_mode():
        assert greedy(model, ids) == greedy(lab.zoo.dense(NAME), ids)
    assert model.csd.copies.recovered_units == 1
    (damage,) = PlainReads(lab.drive, model.csd.packed).verify(lambda *_: None)
    assert (damage.site, damage.copy, damage.units.tolist()) == (site, 0, [11])
