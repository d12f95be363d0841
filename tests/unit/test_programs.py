"""Programs: the quantiser, the file's checks, the scores and what they cost."""

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from csd_device.compute import Cost, CostModel, load_program
from csd_device.errors import CommandError
from csd_protocol.low_bit import dequantise_rows, quantise_rows
from csd_protocol.program_file import (
    ShadowLayer,
    encode_frequency,
    encode_shadow,
    shadow_layer_bytes,
)
from csd_protocol.status import Status

HIDDEN, UNITS, GROUP, RMS_EPS = 192, 40, 64, 1e-5


def shadow_weights(seed: int = 7) -> ShadowLayer:
    rng = np.random.default_rng(seed)
    return ShadowLayer(
        norm=rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32),
        gate=rng.standard_normal((UNITS, HIDDEN)).astype(np.float32),
        up=rng.standard_normal((UNITS, HIDDEN)).astype(np.float32),
        down_norm=rng.uniform(0.1, 2.0, UNITS).astype(np.float32),
    )


def shadow_file(bits: int = 4) -> bytes:
    return encode_shadow("m", {3: shadow_weights()}, bits=bits, group=GROUP, rms_eps=RMS_EPS)


def loaded(data: bytes):
    return load_program(np.frombuffer(bytearray(data), np.uint8))


def refused(data: bytes) -> CommandError:
    with pytest.raises(CommandError) as caught:
        loaded(data)
    return caught.value


def rebuilt(data: bytes, metadata: dict[str, str] | None = None, **tensors: np.ndarray) -> bytes:
    """The file with some tensors or metadata replaced."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    replaced = {name.replace("__", "."): value for name, value in tensors.items()}
    return save(load(data) | replaced, header["__metadata__"] | (metadata or {}))


def with_header(change) -> bytes:
    """A frequency file whose JSON header was changed by `change(header)`."""
    data = encode_frequency("m", {0: np.arange(8)})
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def expected_scores(hidden: np.ndarray, bits: int) -> np.ndarray:
    """The definition in float64, from the values that the levels stand for."""
    weights = shadow_weights()
    gate_rows, up_rows = (
        dequantise_rows(*quantise_rows(values, bits, GROUP), bits).astype(np.float64)
        for values in (weights.gate, weights.up)
    )
    wide = hidden.astype(np.float64)
    normed = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + RMS_EPS) * weights.norm
    gate, up = normed @ gate_rows.T, normed @ up_rows.T
    return (np.abs(gate / (1 + np.exp(-gate)) * up) * weights.down_norm).max(axis=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3])
def test_shadow_scores_are_the_definition(bits: int, rows: int) -> None:
    hidden = np.random.default_rng(1).standard_normal((rows, HIDDEN)).astype(np.float32)
    scores = loaded(shadow_file(bits)).score(3, hidden)
    assert scores.dtype == np.float32
    assert scores.shape == (UNITS,)
    np.testing.assert_allclose(scores, expected_scores(hidden, bits), rtol=2e-4, atol=1e-4)


def test_subnormal_and_zero_scales_are_exact() -> None:
    weights = shadow_weights()
    tiny = ShadowLayer(weights.norm, weights.gate * 1e-6, weights.up * 0, weights.down_norm)
    hidden = np.ones((1, HIDDEN), np.float32)
    file = encode_shadow("m", {0: tiny}, bits=4, group=GROUP, rms_eps=RMS_EPS)
    assert not loaded(file).score(0, hidden).any()


def test_quantiser_beats_plain_rounding_and_keeps_its_layout() -> None:
    values = np.random.default_rng(3).standard_normal((32, 128)).astype(np.float32)
    packed, scales = quantise_rows(values, 4, 64)
    assert packed.shape == (32, 64)
    assert scales.shape == (32, 2)
    assert scales.dtype == np.float16
    error = np.square(dequantise_rows(packed, scales, 4) - values).mean()
    plain = np.abs(values.reshape(32, 2, 64)).max(-1, keepdims=True) / 7
    rounded = np.rint(values.reshape(32, 2, 64) / plain) * plain
    assert error < 0.9 * np.square(rounded.reshape(32, 128) - values).mean()


def test_low_nibble_comes_first() -> None:
    packed, scales = quantise_rows(np.array([[-8.0, 7.0]], np.float32), 4, 2)
    assert packed.tolist() == [[0xF0]]
    assert scales.tolist() == [[1.0]]


@pytest.mark.parametrize(
    "values, bits, group",
    [
        (np.zeros((1, 64)), 5, 64),
        (np.zeros((1, 64)), 4, 48),
        (np.zeros((1, 64)), 4, 0),
        (np.zeros((1, 3)), 4, 3),
        (np.zeros(64), 4, 64),
        (np.full((1, 64), np.nan), 4, 64),
        (np.full((1, 64), 3e38), 4, 64),
    ],
)
def test_quantiser_refuses(values: np.ndarray, bits: int, group: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        quantise_rows(values, bits, group)


def test_frequency_scores_are_its_counts() -> None:
    program = loaded(encode_frequency("m", {0: np.array([3, 1, 2]), 2: np.array([9.0])}))
    assert program.layers == (0, 2)
    assert program.unit_count(2) == 1
    assert program.model == "m"
    assert program.score(0, np.zeros((1, 4), np.float32)).tolist() == [3, 1, 2]


def test_unknown_layer_and_width_name_what_there_is() -> None:
    program = loaded(shadow_file())
    with pytest.raises(CommandError, match=r"layers: 3 to 3") as caught:
        program.score(4, np.zeros((1, HIDDEN), np.float32))
    assert caught.value.status is Status.INVALID_FIELD
    with pytest.raises(CommandError, match=rf"takes \[rows, {HIDDEN}\]"):
        program.score(3, np.zeros((1, HIDDEN + 1), np.float32))


def test_cost_is_the_slower_of_arithmetic_and_memory() -> None:
    cost = loaded(shadow_file()).cost(3, rows=2)
    assert cost.ops == 2 * 2 * UNITS * HIDDEN * 2
    assert cost.dram_bytes == shadow_layer_bytes(HIDDEN, UNITS, 4, GROUP)
    assert CostModel(1e9, 1e9).duration_ns(Cost(ops=10, dram_bytes=30)) == 30
    assert CostModel(1e9, 1e10).duration_ns(Cost(ops=10, dram_bytes=30)) == 10


@pytest.mark.parametrize(
    "key, value, status",
    [
        ("csd.program", "seer", Status.INVALID_PROGRAM_TYPE),
        ("csd.version", "2", Status.INVALID_PROGRAM_TYPE),
        ("csd.model", "", Status.INVALID_PROGRAM_DATA),
        ("csd.bits", "5", Status.INVALID_PROGRAM_DATA),
        ("csd.bits", "-4", Status.INVALID_PROGRAM_DATA),
        ("csd.group", "63", Status.INVALID_PROGRAM_DATA),
        ("csd.group", "0", Status.INVALID_PROGRAM_DATA),
        ("csd.rms_eps", "nan", Status.INVALID_PROGRAM_DATA),
        ("csd.rms_eps", "x", Status.INVALID_PROGRAM_DATA),
        ("csd.activation", "relu", Status.INVALID_PROGRAM_DATA),
    ],
)
def test_metadata_is_checked(key: str, value: str, status: Status) -> None:
    assert refused(rebuilt(shadow_file(), {key: value})).status is status


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("gate__3", np.zeros((UNITS, HIDDEN // 2 - 1), np.uint8)),
        ("gate__3", np.zeros((UNITS, HIDDEN // 2), np.float32)),
        ("up_scale__3", np.full((UNITS, HIDDEN // GROUP), np.nan, np.float16)),
        ("down_norm__3", np.full(UNITS, np.inf, np.float32)),
        ("down_norm__3", np.zeros((UNITS, 1), np.float32)),
        ("norm__3", np.zeros(0, np.float32)),
        ("gate__3", np.zeros(4, np.int64)),
    ],
)
def test_tensors_are_checked(name: str, tensor: np.ndarray) -> None:
    error = refused(rebuilt(shadow_file(), **{name: tensor}))
    assert error.status is Status.INVALID_PROGRAM_DATA
    assert name.replace("__", ".") in error.detail


def set_entry(key: str, value: object):
    return lambda header: header["counts.0"].update({key: value})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        b"\xff" * 64,
        (2).to_bytes(8, "little") + b"[]",
        (3).to_bytes(8, "little") + b"{,}",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        with_header(set_entry("data_offsets", [0, 1 << 62])),
        with_header(set_entry("data_offsets", [-4, 28])),
        with_header(set_entry("data_offsets", [32, 0])),
        with_header(set_entry("data_offsets", None)),
        with_header(set_entry("shape", [1 << 40, 1 << 40])),
        with_header(set_entry("shape", [True])),
        with_header(set_entry("dtype", ["F32"])),
        with_header(lambda header: header.update({"counts.0": 3})),
        with_header(lambda header: header.update({"counts.00": header.pop("counts.0")})),
        with_header(lambda header: header.pop("counts.0")),
        with_header(lambda header: header["__metadata__"].update({"csd.model": 7})),
    ],
)
def test_hostile_files_are_refused(data: bytes) -> None:
    assert refused(data).status is Status.INVALID_PROGRAM_DATA


def test_an_unaligned_file_is_read_all_the_same() -> None:
    data = encode_frequency("m", {0: np.arange(8)})
    length = int.from_bytes(data[:8], "little")
    odd = (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
    assert loaded(odd).score(0, np.zeros((1, 1), np.float32)).tolist() == list(range(8))
