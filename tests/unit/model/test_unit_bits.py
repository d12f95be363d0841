"""Units at 12, 8 and 4 bits: which sites have them, what rounding may cost, what is refused."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from transformers import LlamaForCausalLM

from csd_protocol.lossless_units import decode_rows as decode_lossless
from csd_protocol.low_bit_units import GROUP, decode_rows, join_rows, low_bit_row_bytes
from csd_protocol.packed import Role
from host_client.cli.reports import plan_verdict
from host_client.model.catalog import open_model, read_units
from host_client.model.errors import DifferentModel, UnsupportedModel, ValueOverflow
from host_client.model.packer import manifest_of, pack
from host_client.model.safetensors_folder import SafetensorsFolder
from host_client.model.synthetic import open_synthetic
from host_client.model.unit_bits import fewer_bits, rounded
from host_client.runtime.plan import make_plan

values_of = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.sampled_from([GROUP, 3 * GROUP])),
    elements=st.floats(-1000, 1000, width=32),
)


@settings(deadline=None)  # the first example compiles
@given(values_of, st.sampled_from([8, 4]))
def test_a_value_moves_by_half_a_step_at_most(values: np.ndarray, bits: Any) -> None:
    rows = rounded(values, bits)
    cols = values.shape[1]
    assert rows.shape == (values.shape[0], low_bit_row_bytes(cols, bits))
    found = decode_rows(rows, cols, bits).reshape(values.shape[0], -1, GROUP)
    groups = values.reshape(found.shape)
    peak = np.abs(groups).max(2)
    step = peak / 127 if bits == 8 else (groups.max(2) - groups.min(2)) / 15
    slack = 0.02 * peak + 4e-6  # of float16 (128 levels of its least step), and clipped peaks
    assert (np.abs(found - groups).max(2) <= step / 2 + slack).all()


@given(st.data())
def test_levels_scales_and_minima_are_decoded(data: st.DataObject) -> None:
    """Against the plainest reading of the bytes."""
    raw = data.draw(st.binary(min_size=20, max_size=20))
    packed = np.frombuffer(raw[:16], np.uint8).reshape(1, 16)
    numbers = np.clip(np.frombuffer(raw[16:], np.int16), -9999, 9999).astype(np.float16)
    row = join_rows(packed, numbers[None, :1], numbers[None, 1:])
    scale, minimum = float(numbers[0]), float(numbers[1])
    levels = [byte & 15 for byte in raw[:16]] + [byte >> 4 for byte in raw[:16]]
    expected = np.array([level * scale + minimum for level in levels], np.float32)
    np.testing.assert_allclose(decode_rows(row, GROUP, 4)[0], expected, rtol=1e-6)
    signed = np.frombuffer(raw[:16] * 2, np.int8).astype(np.float32)
    wide = join_rows(np.frombuffer(raw[:16] * 2, np.uint8).reshape(1, 32), numbers[None, :1])
    np.testing.assert_allclose(decode_rows(wide, GROUP, 8)[0], signed * scale, rtol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_small_stays_and_rows_of_tables_have_8_bits(
    ram_drive: Any, tiny_folder: Path, bits: Any
) -> None:
    with SafetensorsFolder(tiny_folder) as checkpoint:
        packed = pack(checkpoint, ram_drive, "low", bits=bits)
        assert packed.format_version == 4
        found = {site.role: site.bits for site in packed.sites}
        assert {found[role] for role in (Role.FFN, Role.HEADS, Role.KV)} == {bits}
        assert found[Role.EMBED] == 8
        assert {found[role] for role in (Role.NORMS, Role.FINAL_NORM)} == {16}
        gate = (
            checkpoint.read_rows("model.layers.0.mlp.gate_proj.weight", 0, 5).half().float().numpy()
        )
        down = checkpoint.read_rows("model.layers.0.mlp.down_proj.weight", 0, gate.shape[1])
    units = read_units(ram_drive, packed.find(Role.FFN, 0), 0, 5).view(np.uint8)
    assert np.array_equal(units[:, 0], rounded(gate, bits))
    columns = np.ascontiguousarray(down[:, :5].half().float().numpy().T)
    assert np.array_equal(units[:, 2], rounded(columns, bits))


def saved(model: LlamaForCausalLM, path: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Of a copy: all tests share the model."""
    copy.deepcopy(model).to(dtype).save_pretrained(path)
    return path


def test_at_12_bits_every_matrix_keeps_its_values(
    ram_drive: Any, tiny_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    with SafetensorsFolder(saved(tiny_model, tmp_path)) as checkpoint:
        wide, packed = (pack(checkpoint, ram_drive, str(bits), bits=bits) for bits in (16, 12))
    assert packed.format_version == 5
    for site, same in zip(packed.sites, wide.sites, strict=True):
        is_vector = site.role in (Role.NORMS, Role.FINAL_NORM)
        assert site.bits == (16 if is_vector else 12)
        units = read_units(ram_drive, site, 0, site.count)
        rows = units.reshape(site.count * site.rows, -1)
        found = rows if is_vector else decode_lossless(rows.view(np.uint8), site.cols)
        expected = read_units(ram_drive, same, 0, same.count)
        assert np.array_equal(found, expected.reshape(found.shape)), site.name


def test_12_bits_want_bfloat16_and_say_so(
    ram_drive: Any, tiny_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    message = r"12 bits hold bfloat16 .* float16.*Pack at 16 bits; or, .* --dtype bfloat16"
    with SafetensorsFolder(saved(tiny_model, tmp_path, torch.float16)) as checkpoint:
        for refused in (pack, manifest_of):
            arguments = (checkpoint, *([ram_drive] if refused is pack else []), "half")
            with pytest.raises(UnsupportedModel, match=message):
                refused(*arguments, bits=12)
        packed = pack(checkpoint, ram_drive, "rounded", bits=12, dtype="bfloat16")
    assert packed.dtype == "bfloat16"
    assert packed.find(Role.FFN, 0).bits == 12


def test_12_bits_of_a_synthetic_model_are_refused(ram_drive: Any) -> None:
    with (
        open_synthetic("llama3-8b") as checkpoint,
        pytest.raises(UnsupportedModel, match=r"synthetic llama3-8b.*Pack at 16, 8 or 4 bits"),
    ):
        pack(checkpoint, ram_drive, "made", bits=12)


@pytest.mark.parametrize(
    "tensor,line,index", [("up_proj", "row", (9, slice(0, 20))), ("down_proj", "column", (..., 9))]
)
def test_a_row_with_too_many_exponents_is_refused_by_name(
    ram_drive: Any, tiny_model: LlamaForCausalLM, tmp_path: Path, tensor: str, line: str, index: Any
) -> None:
    model = copy.deepcopy(tiny_model)
    weight = getattr(model.model.layers[1].mlp, tensor).weight
    with torch.no_grad():
        weight[index] *= 2.0 ** -torch.arange(0, 2 * weight[index].numel(), 2)
    message = rf"layers\.1\.mlp\.{tensor}.*{line} 9 has \d+ values .* room for 7\. Pack at 16 bits"
    with (
        SafetensorsFolder(saved(model, tmp_path)) as checkpoint,
        pytest.raises(ValueOverflow, match=message),
    ):
        pack(checkpoint, ram_drive, "spread", bits=12)


def test_fewer_bits_are_those_that_a_model_could_have(
    tiny_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    with SafetensorsFolder(saved(tiny_model, tmp_path, torch.float16)) as half:
        assert fewer_bits(manifest_of(half, "half")) == [8, 4]
    with SafetensorsFolder(saved(tiny_model, tmp_path)) as checkpoint:
        assert fewer_bits(manifest_of(checkpoint, "model")) == [12, 8, 4]
        assert fewer_bits(manifest_of(checkpoint, "model", 12)) == [8, 4]
    with open_synthetic("llama3-8b") as made:
        assert made.dtype == "bfloat16"
        packed = manifest_of(made, "made")
    assert fewer_bits(packed) == [8, 4]
    odd = [site.model_copy(update={"cols": 48}) for site in packed.sites]
    assert fewer_bits(packed.model_copy(update={"sites": tuple(odd)})) == []


def test_a_plan_says_that_12_bits_would_do_without_loss() -> None:
    with open_synthetic("llama3-8b") as made:
        packed = manifest_of(made, "made")
    trained = packed.model_copy(update={"source": "elsewhere"})
    verdict = plan_verdict(trained, make_plan(trained, 13 << 30, 512))
    assert verdict is not None
    assert verdict.startswith("At 12 bits (11.6 GiB, pack --bits 12, without loss) all of it would")
    verdict = plan_verdict(packed, make_plan(packed, 13 << 30, 512))
    assert verdict is not None
    assert verdict.startswith("At 8 bits (")


def test_other_bits_are_another_model(ram_drive: Any, tiny_folder: Path) -> None:
    with SafetensorsFolder(tiny_folder) as checkpoint:
        wide = pack(checkpoint, ram_drive, "model")
        assert wide.format_version == 1
        with pytest.raises(DifferentModel, match="at other bits"):
            pack(checkpoint, ram_drive, "model", bits=4)
        narrow = pack(checkpoint, ram_drive, "model", bits=4, replace=True)
    assert open_model(ram_drive, "model")[1] == narrow
    assert narrow.weights_bytes_16bit == wide.weights_bytes == wide.weights_bytes_16bit


def test_rows_that_are_no_whole_groups_are_refused(
    ram_drive: Any, tiny_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    config = tiny_model.config.__class__(**tiny_model.config.to_dict() | {"hidden_size": 48})
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(tmp_path)
    with (
        SafetensorsFolder(tmp_path) as checkpoint,
        pytest.raises(UnsupportedModel, match=r"groups of 32.*Pack at 16 bits"),
    ):
        pack(checkpoint, ram_drive, "odd", bits=8)


def test_values_beyond_a_scale_are_refused_by_name(
    ram_drive: Any, tiny_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e6
    saved(model, tmp_path)
    for bits in (8, 4):
        with (
            SafetensorsFolder(tmp_path) as checkpoint,
            pytest.raises(ValueOverflow, match=r"layers\.1\.mlp\.up_proj.*Pack at 16 bits"),
        ):
            pack(checkpoint, ram_drive, f"big-{bits}", bits=bits)
