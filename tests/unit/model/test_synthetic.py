"""Synthetic models: true shapes, the same bytes every time, and CRCs that are right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from csd_protocol.crc32c import crc32c_units
from csd_protocol.low_bit_units import decode_rows
from csd_protocol.packed import Bits, PackedModel, Role
from host_client.model.catalog import open_model, read_units
from host_client.model.errors import InvalidConfig, ModelNotFound, UnknownFamily
from host_client.model.families import family_sites
from host_client.model.packer import pack
from host_client.model.storage import BlockStorage
from host_client.model.synthetic import SyntheticCheckpoint, open_synthetic, shape_names

MakeDrive = Callable[[], Any]
CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 72,
    "intermediate_size": 130,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 301,
    "torch_dtype": "bfloat16",
}
LOW_BIT_CONFIG = CONFIG | {"hidden_size": 96}  # whole groups
# Parameters as their makers count them, in millions, the embedding among them.
PARAMETERS = {
    "chatglm3-6b": 6_244,
    "llama3-8b": 8_030,
    "mixtral-8x7b": 46_703,
    "qwen-7b": 7_721,
    "qwen2-7b": 7_616,
}


@pytest.mark.parametrize("name", shape_names())
def test_shapes_have_as_many_parameters_as_the_models(name: str) -> None:
    sites = family_sites(open_synthetic(name))
    values = sum(site.count * site.rows * site.cols for site in sites)
    assert round(values / 1e6) == PARAMETERS[name]


def _packed(storage: BlockStorage, seed: int = 0, bits: Bits = 16) -> PackedModel:
    config = CONFIG if bits == 16 else LOW_BIT_CONFIG
    return pack(SyntheticCheckpoint("s", config, seed), storage, "s", bits=bits)


def _units(storage: BlockStorage, packed: PackedModel, role: Role, layer: int) -> torch.Tensor:
    site = packed.find(role, layer)
    data = storage.read(site.offset_bytes, -(-site.length_bytes // 4096) * 4096)
    values = torch.frombuffer(bytearray(data[: site.length_bytes]), dtype=torch.bfloat16)
    return values.reshape(site.count, -1).float()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_every_unit_has_the_checksum_that_was_noted(make_drive: MakeDrive, bits: Bits) -> None:
    storage = make_drive()
    packed = _packed(storage, bits=bits)
    table = packed.crc_table
    checksums = np.frombuffer(storage.read(table.offset_bytes, 4096), "<u4")
    for site in packed.sites:
        data = storage.read(site.offset_bytes, -(-site.length_bytes // 4096) * 4096)
        rows = np.frombuffer(data, np.uint8, site.length_bytes).reshape(site.count, -1)
        noted = checksums[site.first_crc : site.first_crc + site.count]
        assert (crc32c_units(rows) == noted).all(), site.name


def test_values_are_as_a_fresh_model_has_them(make_drive: MakeDrive) -> None:
    storage = make_drive()
    packed = _packed(storage)
    norms = _units(storage, packed, Role.NORMS, 1)[0]
    assert norms[: 2 * 72].unique().tolist() == [1.0]
    assert norms[2 * 72 :].unique().tolist() == [0.0]  # biases
    for role in (Role.HEADS, Role.KV, Role.FFN):
        values = _units(storage, packed, role, 1)
        assert abs(float(values.mean())) < 2e-3
        assert float(values.std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("bits", [8, 4])
def test_levels_stand_for_values_of_the_same_spread(make_drive: MakeDrive, bits: Bits) -> None:
    storage = make_drive()
    packed = _packed(storage, bits=bits)
    for role in (Role.HEADS, Role.KV, Role.FFN):
        site = packed.find(role, 1)
        assert site.bits == bits
        words = read_units(storage, site, 0, site.count).reshape(-1, site.row_bytes // 2)
        values = decode_rows(words.view(np.uint8), site.cols, bits)
        assert abs(values.mean()) < 2e-3
        assert values.std() == pytest.approx(0.02, rel=0.05)


def test_the_same_seed_gives_the_same_bytes_and_another_others(make_drive: MakeDrive) -> None:
    first, again, other = make_drive(), make_drive(), make_drive()
    packed = _packed(first)
    _packed(again)
    _packed(other, seed=1)
    assert first.data == again.data
    mine, theirs = (_units(storage, packed, Role.FFN, 0) for storage in (first, other))
    assert not torch.equal(mine, theirs)
    assert not torch.equal(mine, _units(first, packed, Role.FFN, 1))


def test_an_interrupted_pack_goes_on_to_the_same_bytes(make_drive: MakeDrive) -> None:
    whole, broken = make_drive(), make_drive()
    _packed(whole)
    broken.writes_left = 18
    with pytest.raises(ConnectionError):
        pack(SyntheticCheckpoint("s", CONFIG), broken, "s", save_every_bytes=1)
    broken.forget()
    _packed(broken)
    for storage in (whole, broken):
        _, packed = open_model(storage, "s")
        assert packed.sites
    sites = packed.sites
    start, end = sites[0].offset_bytes, sites[-1].offset_bytes + sites[-1].length_bytes
    assert whole.data[start:end] == broken.data[start:end]


def test_a_config_json_is_called_by_its_folder_and_others_by_their_name(tmp_path: Path) -> None:
    folder = tmp_path / "My-Model"
    folder.mkdir()
    for name in ("config.json", "other.json"):
        (folder / name).write_text(json.dumps(CONFIG))
    assert open_synthetic(str(folder / "config.json")).name == "my-model"
    made = open_synthetic(str(folder / "other.json"), seed=4)
    assert (made.name, made.dtype, made.source) == ("other", "bfloat16", "synthetic other, seed 4")


def test_what_is_no_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no known shape .*mixtral-8x7b"):
        open_synthetic("llama9")
    path = tmp_path / "config.json"
    path.write_text("[1]")
    with pytest.raises(InvalidConfig, match=r"no.* JSON object"):
        open_synthetic(str(path))
    path.write_text("{")
    with pytest.raises(InvalidConfig, match="not valid JSON"):
        open_synthetic(str(path))
    path.write_text('{"model_type": "bert"}')
    with pytest.raises(UnknownFamily, match="bert"):
        open_synthetic(str(path))
