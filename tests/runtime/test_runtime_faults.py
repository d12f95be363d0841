"""Damage, loss and refusals: said by name, and nothing is left behind that hinders what follows."""

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from csd_protocol.packed import Role, Site
from csd_protocol.units import KIB
from host_client.driver import Drive, DriveLost
from host_client.driver.embedded import Daemon
from host_client.io import Extent, Reader
from host_client.model.packer import pack
from host_client.model.safetensors_folder import SafetensorsFolder
from host_client.runtime import causal_lm
from host_client.runtime.checksums import UnitCorrupt
from host_client.runtime.copies import UnitsLost
from host_client.runtime.refusals import ContextExceeded, WindowTooSmall

NAME = "tied"
CLOSE = 1e-5


@pytest.fixture
def agree(far_from, tokens_of) -> Any:
    """Whether a model's logits are the dense model's."""

    def check(lab: Any, model: Any, name: str = NAME) -> bool:
        ids = tokens_of(lab, name, 5)
        with torch.inference_mode():
            return far_from(model(ids).logits, lab.zoo.dense(name)(ids).logits) <= CLOSE

    return check


def run(lab: Any, model: Any, tokens_of: Any) -> None:
    with torch.inference_mode():
        model(tokens_of(lab, NAME, 5))


# ---- damage ------------------------------------------------------------------------------------


@dataclass
class Damage:
    """Flips a bit of the window just before the `nth` read from now on, counted from 0.

    Reads of fewer extents are left alone: those by name have one, those of a whole layer three.
    """

    nth: int | None = None
    offset_in_last: int = 0
    extents_min: int = 3

    def strike(self, window: Path, extents: Sequence[Extent]) -> None:
        if self.nth is None or len(extents) < self.extents_min:
            return
        if self.nth == 0:
            at = extents[-1].offset + self.offset_in_last
            with window.open("r+b") as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 0x40]))
        self.nth = self.nth - 1 if self.nth else None


class DamagingReader:
    """A reader of a window whose bytes change after they were staged."""

    def __init__(self, inner: Reader, damage: Damage) -> None:
        self.name, self.path, self.fallback_reason = inner.name, inner.path, inner.fallback_reason
        self._inner, self._damage = inner, damage

    def read(self, extents: Sequence[Extent]) -> None:
        self._damage.strike(self.path, extents)
        self._inner.read(extents)

    def close(self) -> None:
        self._inner.close()


@pytest.fixture
def damage(monkeypatch: pytest.MonkeyPatch) -> Damage:
    armed = Damage()
    genuine = causal_lm.open_reader
    monkeypatch.setattr(
        causal_lm, "open_reader", lambda path, kind: DamagingReader(genuine(path, kind), armed)
    )
    return armed


@pytest.mark.parametrize("layer", [0, 3])
def test_bytes_changed_in_the_window_are_found_and_named(
    make_lab, tokens_of, agree, damage: Damage, layer: int
) -> None:
    lab = make_lab()
    model = lab.open(NAME, lab.budget(NAME, 0.0))
    missing = model.csd.engine.resident[model.csd.packed.find(Role.FFN, layer).site].missing
    unit_bytes = model.csd.packed.find(Role.FFN, layer).unit_bytes
    for place in (0, 7, missing.size - 1):
        model.csd.engine.abandon()  # what was prefetched is there already
        damage.nth, damage.offset_in_last = layer, place * unit_bytes + 9
        with pytest.raises(UnitCorrupt, match=rf"layers\.{layer}\.ffn") as error:
            run(lab, model, tokens_of)
        assert (error.value.site.layer, error.value.unit) == (layer, missing[place])
        assert agree(lab, model)


def test_damage_while_resident_units_are_loaded_leaves_nothing_open(
    make_lab, damage: Damage, process_state
) -> None:
    lab = make_lab()
    lab.open(NAME).csd.close()
    before = process_state()
    damage.nth, damage.extents_min = 3, 1
    with pytest.raises(UnitCorrupt):
        lab.open(NAME)
    assert process_state() == before
    assert lab.leases == 0


def test_no_lease_is_lost_with_a_damaged_unit(make_lab, tokens_of, damage: Damage) -> None:
    lab = make_lab()
    model = lab.open(NAME, lab.budget(NAME, 0.0))
    damage.nth = 1
    with pytest.raises(UnitCorrupt):
        run(lab, model, tokens_of)
    model.csd.engine.abandon()
    assert lab.leases == 0


def flip(image: Path, place: int) -> None:
    with image.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def place_in_nand(lab: Any, site: Site, unit: int) -> int:
    """Where the NAND's file has a byte of this unit; its data is unique."""
    offset = site.offset_bytes + unit * site.unit_bytes
    data = lab.drive.read(offset, site.unit_bytes)
    with lab.image.open("rb") as file:
        written = file.read(64 << 20)  # the rest of a new drive is empty
    found = written.find(data)
    assert found >= 0
    return found + site.unit_bytes // 2


@pytest.mark.parametrize("role, layer, unit", [(Role.FFN, 2, 77), (Role.KV, 1, 0)])
def test_bytes_changed_in_the_nand_are_the_drives_to_find(
    make_lab, tokens_of, agree, role: Role, layer: int, unit: int
) -> None:
    lab = make_lab()
    model = lab.open(NAME, lab.budget(NAME, 0.0))
    site = model.csd.packed.find(role, layer)
    place = place_in_nand(lab, site, unit)
    for _ in range(2):
        model.csd.engine.abandon()  # what was prefetched is staged already
        flip(lab.image, place)
        with pytest.raises(UnitsLost, match=rf"lost unit {unit} of {site.name}.*2/82h") as error:
            run(lab, model, tokens_of)
        assert {lost.name: units.tolist() for lost, units in error.value.units.items()} == {
            site.name: [unit]
        }
        flip(lab.image, place)
        assert agree(lab, model)
    model.csd.engine.abandon()
    assert lab.leases == 0


# ---- a drive that goes away ----------------------------------------------------------------------


class After(BaseStreamer):
    """Does something when so many tokens have come."""

    def __init__(self, tokens: int, act: Any) -> None:
        self._left, self._act = tokens, act

    def put(self, value: torch.Tensor) -> None:
        self._left -= 1
        if self._left == 0:
            self._act()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_drive_lost_in_the_middle_ends_the_generation(
    make_lab, tokens_of, greedy, process_state, share: float
) -> None:
    lab = make_lab()
    model = lab.open(NAME, lab.budget(NAME, share))
    ids = tokens_of(lab, NAME, 5)
    with pytest.raises(DriveLost):
        greedy(model, ids, new=20, streamer=After(4, lab.link.close))
    with pytest.raises(DriveLost):
        run(lab, model, tokens_of)
    model.csd.close()
    assert not prefetching()
    assert lab.device.connect("another", "host").depth  # the drive itself lives


def prefetching() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "prefetch" in thread.name]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    started = Daemon.start(tmp_path / "drive.csd", "tiny", "off", start_timeout_s=120.0)
    yield started
    started.stop()


def test_a_daemon_killed_in_the_middle_ends_the_generation(
    daemon: Daemon, zoo, tokens_of, greedy, lab
) -> None:
    with Drive.connect(daemon.address) as drive:
        with SafetensorsFolder(zoo.folder(NAME)) as checkpoint:
            pack(checkpoint, drive, NAME)
        model = causal_lm.CsdModelForCausalLM.from_pretrained(
            NAME, drive, lab.budget(NAME, 0.2), context=64
        )
        kill = After(4, lambda: os.kill(daemon.pid, signal.SIGKILL))
        with pytest.raises(DriveLost):
            greedy(model, tokens_of(lab, NAME, 5), new=40, streamer=kill)
        model.csd.close()
    assert not prefetching()


# ---- what stays behind -------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_closing_gives_every_lease_back(lab, tokens_of, greedy, share: float) -> None:
    model = lab.open(NAME, lab.budget(NAME, share))
    greedy(model, tokens_of(lab, NAME, 5))
    model.csd.engine.abandon()
    assert lab.leases == 0
    greedy(model, tokens_of(lab, NAME, 5))
    model.csd.close()
    assert lab.leases == 0
    model.csd.close()


def test_opening_and_closing_leaks_nothing(lab, tokens_of, process_state) -> None:
    def use() -> None:
        model = lab.open(NAME, lab.budget(NAME, 0.3))
        run(lab, model, tokens_of)
        lab.put_back()

    use()
    before = process_state()
    for _ in range(4):
        use()
        assert process_state() == before
    assert not prefetching()


def test_two_models_use_one_drive_by_turns(lab, agree) -> None:
    first = lab.open(NAME, lab.budget(NAME, 0.2))
    second = lab.open("untied", lab.budget("untied", 0.4))
    for _ in range(3):
        assert agree(lab, first)
        assert agree(lab, second, "untied")


def test_one_model_opened_twice_on_one_connection(lab, agree) -> None:
    first = lab.open(NAME, lab.budget(NAME, 0.0))
    second = lab.open(NAME)
    assert agree(lab, second)
    assert agree(lab, first)


def test_a_model_opened_again_elsewise_is_exact_too(lab, agree) -> None:
    """What the host said before that it holds does not count any more."""
    for share in (1.0, 0.0, 0.5):
        model = lab.open(NAME, lab.budget(NAME, share))
        assert agree(lab, model)
        model.csd.close()


def test_a_model_that_is_dropped_unclosed_does_not_disturb_the_next(lab, agree) -> None:
    assert agree(lab, lab.open(NAME, lab.budget(NAME, 0.0)))
    lab.opened.pop().csd.engine.abandon()
    gc.collect()
    assert agree(lab, lab.open(NAME, lab.budget(NAME, 0.6)))


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_context_is_kept_to_the_token(lab, tokens_of, greedy, agree, share: float) -> None:
    context = 12
    model = lab.open(NAME, lab.budget(NAME, share, context), context=context)
    with torch.inference_mode():
        model(tokens_of(lab, NAME, context))
        model(tokens_of(lab, NAME, context // 2, batch=2))
        with pytest.raises(ContextExceeded, match=r"13 tokens .* room for 12.*--context"):
            model(tokens_of(lab, NAME, context + 1))
        with pytest.raises(ContextExceeded):
            model(tokens_of(lab, NAME, context // 2 + 1, batch=2))
    assert agree(lab, model)
    ids = tokens_of(lab, NAME, 8)
    assert len(greedy(model, ids, new=5)[0]) == 5  # the last token is never cached
    with pytest.raises(ContextExceeded):
        greedy(model, ids, new=6)
    assert agree(lab, model)


def test_a_window_too_small_for_a_layer_is_refused_and_a_larger_budget_helps(
    make_lab, agree, process_state
) -> None:
    lab = make_lab(window_bytes=64 * KIB)
    lab.packed(NAME)
    lab.open(NAME).csd.close()
    before = process_state()
    with pytest.raises(WindowTooSmall, match=r"one step needs .* Enlarge the window"):
        lab.open(NAME, lab.budget(NAME, 0.0))
    assert process_state() == before
    assert agree(lab, lab.open(NAME, lab.budget(NAME, 1.0)))


def test_a_window_too_small_for_a_unit_is_refused(make_lab, process_state) -> None:
    lab = make_lab(window_bytes=4 * KIB)
    lab.packed(NAME)
    with contextlib.suppress(WindowTooSmall):
        lab.open(NAME)
    before = process_state()
    with pytest.raises(WindowTooSmall, match=r"one unit of layers\.0\.kv .* Enlarge the window"):
        lab.open(NAME)
    assert process_state() == before
