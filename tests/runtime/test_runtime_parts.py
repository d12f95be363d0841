"""Layers that are larger than a staging buffer: they pass through it part by part."""

from typing import Any

import pytest
import torch

from csd_protocol.packed import Role
from csd_protocol.units import KIB
from host_client.runtime import plan
from host_client.runtime.plan import BUFFERS
from tests.runtime.decoding import decode
from tests.runtime.test_runtime_exact import CLOSE, Interrupted, broken_at
from tests.runtime.test_runtime_kept_fraction import load

PART_BYTES = 7 * 3 * 64 * 2  # seven neurons: no layer has a multiple of them


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PART_BYTES", PART_BYTES)


def layer_bytes(model: Any) -> int:
    """What the layer that lacks most lacks of its FFN."""
    packed, kept = model.csd.packed, model.csd.plan.resident_units
    ffns = [site for site in packed.sites if site.role is Role.FFN]
    return max((site.count - kept[site.site]) * site.unit_bytes for site in ffns)


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
@pytest.mark.usefixtures("small_parts")
def test_logits_are_the_dense_models(lab, far_from, tokens_of, name, share) -> None:
    model, dense = lab.open(name, lab.budget(name, share)), lab.zoo.dense(name)
    assert layer_bytes(model) > model.csd.plan.buffer_bytes
    ids = tokens_of(lab, name, 8)
    assert far_from(decode(model, ids, prompt=5), decode(dense, ids, prompt=5)) <= CLOSE
    assert model.csd.plan.total_bytes <= lab.budget(name, share)


def test_small_buffers_leave_more_for_what_is_resident(
    lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = lab.budget("tied", 0.5)
    whole = lab.open("tied", budget).csd.plan
    monkeypatch.setattr(plan, "PART_BYTES", PART_BYTES)
    parts = lab.open("tied", budget).csd.plan
    assert parts.resident_bytes > whole.resident_bytes
    assert parts.staged_bytes_per_token < whole.staged_bytes_per_token


@pytest.mark.parametrize("quality", ["0.3", "0.77", "0.2+correct"])
@pytest.mark.parametrize("lookahead", [0, 2])
def test_what_a_program_chose_comes_in_parts_too(
    lab, far_from, tokens_of, monkeypatch: pytest.MonkeyPatch, quality, lookahead
) -> None:
    load(lab, "shadow")
    ids = tokens_of(lab, "tied", 9)
    found = []
    for part_bytes in (plan.PART_BYTES, PART_BYTES):
        monkeypatch.setattr(plan, "PART_BYTES", part_bytes)
        model = lab.open("tied", lab.budget("tied", 0.0), quality, lookahead=lookahead)
        found.append(decode(model, ids))
        assert model.csd.tally.late_units == 0
    assert model.csd.plan.buffer_bytes < 0.5 * layer_bytes(model)
    assert far_from(*found) <= CLOSE


def test_an_audit_sees_every_part(lab, tokens_of, monkeypatch: pytest.MonkeyPatch) -> None:
    load(lab, "shadow")
    found = []
    for part_bytes in (plan.PART_BYTES, PART_BYTES):
        monkeypatch.setattr(plan, "PART_BYTES", part_bytes)
        model = lab.open("tied", lab.budget("tied", 0.0), 0.4, audit=True)
        decode(model, tokens_of(lab, "tied", 12))
        found.append((model.csd.tally.wanted_units, model.csd.tally.recall))
    assert found[0] == found[1]
    assert found[0][0] > 0


@pytest.mark.parametrize("place", ["FFN", "norm"])
@pytest.mark.usefixtures("small_parts")
def test_a_pass_broken_off_between_parts_gives_its_buffers_back(
    lab, far_from, tokens_of, monkeypatch: pytest.MonkeyPatch, place
) -> None:
    model, dense = lab.open("tied", lab.budget("tied", 0.0)), lab.zoo.dense("tied")
    ids = tokens_of(lab, "tied", 4)
    ffn = model.model.layers[1].mlp

    def fail(*_: Any) -> None:
        raise Interrupted

    with torch.inference_mode():
        for _ in range(BUFFERS + 1):
            if place == "FFN":
                with monkeypatch.context() as patch:
                    patch.setattr(ffn, "_add", fail)
                    with pytest.raises(Interrupted):
                        model(ids)
            else:
                hook = broken_at(model.model.norm)
                with pytest.raises(Interrupted):
                    model(ids)
                hook.remove()
            assert far_from(model(ids).logits, dense(ids).logits) <= CLOSE


@pytest.mark.usefixtures("small_parts")
def test_a_window_smaller_than_a_layer_does(make_lab, far_from, tokens_of) -> None:
    window_bytes = 48 * KIB
    lab = make_lab(window_bytes=window_bytes)
    model, dense = lab.open("tied", lab.budget("tied", 0.0)), lab.zoo.dense("tied")
    ids = tokens_of(lab, "tied", 6)
    assert layer_bytes(model) > window_bytes
    assert far_from(decode(model, ids, prompt=4), decode(dense, ids, prompt=4)) <= CLOSE
