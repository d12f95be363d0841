"""What every kind of program does: it scores what its definition says, on a drive and beside it.

`program_samples` has a small program of each kind and its definition in float64. What is hostile
goes through the same door as what is not: the drive refuses it with a status and goes on.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from program_samples import (
    BITS,
    DECAY,
    GROUP,
    HIDDEN,
    LAYERS,
    MODEL,
    REFERENCES,
    SAMPLES,
    SHAPE,
    TOKENS,
    UNITS,
    FarsightReference,
    FfnReference,
    RolloutReference,
    counts,
    ffn_site,
    heads_site,
    packed_image,
    random,
    rms_norm,
    rollout_file,
    shadow_file,
    site_of,
)
from safetensors.numpy import load, save

from csd_device.clock import TimeMode, VirtualClock
from csd_device.compute import Cost, CostModel, Origin, Program, ProgramInput, load_program
from csd_device.config import load_config
from csd_device.drive import Drive as DeviceDrive
from csd_device.errors import CommandError
from csd_device.service.endpoint import Endpoint
from csd_protocol.opcodes import Cns
from csd_protocol.packed import Role
from csd_protocol.program_file import (
    ProgramKind,
    encode_frequency,
    encode_lowrank,
    encode_oracle,
    encode_window,
)
from csd_protocol.status import Status
from host_client.driver import CommandFailed, Drive, StageTarget, Told
from host_client.driver import Origin as ToldOrigin
from host_client.driver import drive as driver_drive
from host_client.driver.link import InProcessLink

KINDS = sorted(SAMPLES)
ENTERED_0 = Origin(0, behind_attention=False)
REFUSALS = {Status.INVALID_PROGRAM_DATA, Status.INVALID_PROGRAM_TYPE}


def file_of(kind: str, model: str = MODEL) -> bytes:
    return SAMPLES[kind].encode(model)


def loaded(data: bytes) -> Program:
    return load_program(np.frombuffer(bytearray(data), np.uint8))


def input_of(kind: str, rows: int = 1, seed: int = 7) -> np.ndarray:
    return random(seed, rows, SAMPLES[kind].width)


def scores_of(program: Program, hidden: np.ndarray, layer: int, **given: object) -> np.ndarray:
    """As a host that the program has not met yet."""
    told = ProgramInput(hidden, **({"origin": ENTERED_0} | given))
    return program.begin(told, program.new_memory()).score(layer)[0]


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """To a part of the largest value: cancellation makes small ones relatively worse."""
    assert np.abs(actual - expected).max() <= 2e-5 * np.abs(expected).max()


# ---- scores and costs -------------------------------------------------------------------------


def test_every_kind_has_a_sample() -> None:
    assert {kind.partition("-")[0] for kind in KINDS} == {kind.value for kind in ProgramKind}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_definition(kind: str, rows: int) -> None:
    program, hidden = loaded(file_of(kind)), input_of(kind, rows)
    assert program.layers == tuple(range(LAYERS))
    for layer in program.layers:
        scores = scores_of(program, hidden, layer)
        assert scores.shape == (UNITS,) == (program.unit_count(layer),)
        assert scores.dtype == np.float32
        assert np.isfinite(scores).all()
        assert_close(scores, REFERENCES[kind](layer, hidden))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_same_bits_again(kind: str) -> None:
    file, hidden = file_of(kind), input_of(kind, 2)
    first, second = (scores_of(loaded(file), hidden, LAYERS - 1) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_costs_operations_and_bytes(kind: str) -> None:
    program = loaded(file_of(kind))
    given = ProgramInput(input_of(kind, 2), origin=ENTERED_0)
    _, cost = program.begin(given, program.new_memory()).score(LAYERS - 1)
    assert cost.ops > 0
    assert 0 < cost.dram_bytes <= program.dram_bytes + program.memory_bytes
    slow_compute, slow_dram = CostModel(1e9, 1e15), CostModel(1e15, 1e9)
    assert slow_compute.duration_ns(cost) == cost.ops
    assert slow_dram.duration_ns(cost) == cost.dram_bytes


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("frequency", "window")])
def test_input_of_another_width_is_refused(kind: str) -> None:
    program = loaded(file_of(kind))
    for hidden in (random(1, 1, SAMPLES[kind].width + 1), np.empty((0, HIDDEN), np.float32)):
        with pytest.raises(CommandError) as caught:
            scores_of(program, hidden, 0)
        assert caught.value.status is Status.INVALID_FIELD


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_layer_is_refused(kind: str) -> None:
    with pytest.raises(CommandError, match="layers: 0 to 2") as caught:
        scores_of(loaded(file_of(kind)), input_of(kind), LAYERS)
    assert caught.value.status is Status.INVALID_FIELD


@pytest.mark.parametrize("kind", ["frequency", "window", "lowrank", "oracle"])
def test_a_role_may_be_heads(kind: str) -> None:
    four = np.arange(4.0)
    data = {
        "frequency": encode_frequency(MODEL, {0: four}, role=Role.HEADS),
        "window": encode_window(MODEL, {0: four}, tokens=2, decay=1, role=Role.HEADS),
        "lowrank": encode_lowrank(MODEL, {}, rms_eps=1e-5, role=Role.HEADS),
        "oracle": encode_oracle(MODEL, {0: four}, role=Role.HEADS),
    }[kind]
    if kind == "lowrank":
        assert refused(data).status is Status.INVALID_PROGRAM_DATA  # it has no layer
    else:
        assert loaded(data).role is Role.HEADS


# ---- state ------------------------------------------------------------------------------------


def test_a_window_sums_what_was_observed_of_late() -> None:
    program = loaded(file_of("window"))
    memory = program.new_memory()
    seen = [[0, 1], [1, 2], [2, 47], [0, 2]]
    for units in seen:
        program.observe(1, np.array(units, np.uint32), memory)
    expected = counts(1).astype(np.float64)
    for age, units in enumerate(reversed(seen[-TOKENS:])):
        expected[units] += DECAY**age
    given = ProgramInput(input_of("window"))
    assert_close(program.begin(given, memory).score(1)[0], expected)
    np.testing.assert_array_equal(program.begin(given, memory).score(0)[0], counts(0))


# Commands of one host: (position, rows). Goes on, wraps around the context of 6, is said again,
# goes back, begins anew.
TALK = [(0, 4), (4, 1), (5, 1), (6, 1), (7, 1), (7, 1), (5, 2), (7, 1), (0, 3), (3, 1)]


def forget_as_documented(attention: list, talk: list[tuple[int, int]], at: int) -> None:
    """What PROGRAMS.md says of a command that does not go on where the last one ended."""
    first, rows = talk[at]
    last_first, last_rows = talk[at - 1] if at else (0, 0)
    if (first, rows) != (last_first, last_rows) and first != last_first + last_rows:
        for layer in attention:
            layer.kept = {p: kept for p, kept in layer.kept.items() if p < first}


def test_a_farsight_remembers_the_positions_before() -> None:
    program, reference = loaded(file_of("farsight")), FarsightReference()
    memory = program.new_memory()
    for at, (first, rows) in enumerate(TALK):
        hidden = random(50 + at, rows, HIDDEN)
        forget_as_documented(reference.attention, TALK, at)
        run = program.begin(ProgramInput(hidden, first), memory)
        assert_close(run.score(1)[0], reference.scores(1, first, hidden))
        assert_close(run.score(2)[0], reference.scores(2, first, hidden))


@pytest.mark.parametrize("bits", [3, 4])
def test_a_rollout_carries_states_through_its_layers(bits: int) -> None:
    program, reference = loaded(rollout_file(bits)), RolloutReference(bits)
    memory = program.new_memory()
    for at, (first, rows) in enumerate(TALK):
        hidden = random(80 + at, rows, HIDDEN)
        layer, behind = (0, False) if rows > 1 else (at % 2, at % 3 == 0)
        forget_as_documented(reference.attention, TALK, at)
        run = program.begin(ProgramInput(hidden, first, Origin(layer, behind)), memory)
        expected = reference.scores(layer, behind, first, hidden)
        for number in sorted(expected, reverse=at % 2 == 0):
            assert_close(run.score(number)[0], expected[number])


@pytest.mark.parametrize("bits", [3, 4])
def test_a_rollout_scores_kv_groups_by_what_they_add(bits: int) -> None:
    program, reference = loaded(rollout_file(bits)), RolloutReference(bits)
    memory = program.new_memory()
    assert program.kv_groups == SHAPE.kv_heads
    for at, (first, rows) in enumerate([(0, 4), (4, 1), (5, 1), (6, 2)]):
        hidden = random(90 + at, rows, HIDDEN)
        layer, behind = (0, False) if rows > 1 else (at % 2, True)
        run = program.begin(ProgramInput(hidden, first, Origin(layer, behind)), memory)
        expected = reference.scores(layer, behind, first, hidden)
        assert set(reference.group_norms) == set(expected) - ({layer} if behind else set())
        for number, norms in reference.group_norms.items():
            assert_close(run.score_heads(number)[0], norms)
            assert_close(run.score(number)[0], expected[number])
        if behind:
            with pytest.raises(CommandError, match="too late for its KV groups") as caught:
                run.score_heads(layer)
            assert caught.value.status is Status.INVALID_FIELD


def test_scores_of_kv_groups_cost_an_output_projection_and_change_nothing() -> None:
    program, hidden = loaded(rollout_file()), input_of("rollout")
    given = ProgramInput(hidden, 0, Origin(0, behind_attention=True))
    asked, plain = (program.begin(given, program.new_memory()) for _ in range(2))
    spent = [asked.score_heads(1)[1], asked.score(1)[1], asked.score_heads(1)[1]]
    scores, alone = plain.score(1)
    np.testing.assert_array_equal(asked.score(1)[0], scores)
    width = SHAPE.heads * SHAPE.head_dim
    assert sum(cost.ops for cost in spent) - alone.ops == 2 * HIDDEN * (width + SHAPE.kv_heads)
    assert sum(cost.dram_bytes for cost in spent) - alone.dram_bytes == HIDDEN * (
        width // 2 + 2 * width // GROUP
    )
    assert spent[2].ops == 0


def test_a_rollout_is_of_neurons_whatever_else_it_scores() -> None:
    error = refused(rebuilt(rollout_file(), {"csd.role": "heads"}, {}))
    assert "a rollout is of ffn" in error.detail


def note(program: Program, memory: Any, layer: int, first: int, hidden: np.ndarray) -> Cost:
    origin = Origin(layer, behind_attention=False)
    return program.begin(ProgramInput(hidden, first, origin), memory).remember(layer)


# A prompt in parts, layer after layer; shorter and longer than the context of 6.
PROMPTS = [[(0, 4)], [(0, 3), (3, 2)], [(0, 4), (4, 4), (8, 1)], [(0, 9)]]


@pytest.mark.parametrize("parts", PROMPTS)
def test_a_rollout_takes_note_of_a_prompt_and_goes_on_behind_it(parts: list) -> None:
    program, reference = loaded(rollout_file()), RolloutReference(4)
    memory = program.new_memory()
    for text in range(2):  # the second one takes the place of the first
        for layer in range(LAYERS):
            for first, rows in parts:
                hidden = random(layer + 100 * first + text, rows, HIDDEN)
                cost = note(program, memory, layer, first, hidden)
                reference.remember(layer, first, hidden)
                assert cost.ops == 2 * rows * HIDDEN * 2 * SHAPE.kv_heads * SHAPE.head_dim
        at = sum(parts[-1])
        for position in (at, at + 1, at):
            hidden = random(7 + position, 1, HIDDEN)
            given = ProgramInput(hidden, position, Origin(0, behind_attention=True))
            if position == at:
                for attention in reference.attention:
                    attention.kept = {p: kept for p, kept in attention.kept.items() if p < at}
            expected = reference.scores(0, True, position, hidden)
            assert_close(program.begin(given, memory).score(LAYERS - 1)[0], expected[LAYERS - 1])


@pytest.mark.parametrize("behind", [True, False])
def test_taking_note_of_states_from_further_back_rolls_them_forward(behind: bool) -> None:
    program, reference = loaded(rollout_file()), RolloutReference(4)
    memory, hidden = program.new_memory(), random(1, 3, HIDDEN)
    run = program.begin(ProgramInput(hidden, 0, Origin(0, behind)), memory)
    run.remember(LAYERS - 1)
    expected = reference.scores(0, behind, 0, hidden)
    assert_close(run.score(LAYERS - 1)[0], expected[LAYERS - 1])
    hidden = random(2, 1, HIDDEN)
    again = program.begin(ProgramInput(hidden, 3, Origin(0, behind)), memory)
    expected = reference.scores(0, behind, 3, hidden)
    assert_close(again.score(LAYERS - 1)[0], expected[LAYERS - 1])


def test_a_farsight_takes_note_as_it_scores() -> None:
    program = loaded(file_of("farsight"))
    noted, scored = program.new_memory(), program.new_memory()
    hidden, further = random(1, 4, HIDDEN), random(2, 1, HIDDEN)
    program.begin(ProgramInput(hidden), noted).remember(0)
    program.begin(ProgramInput(hidden), scored).score(0)
    given = ProgramInput(further, 4)
    np.testing.assert_array_equal(
        program.begin(given, noted).score(1)[0], program.begin(given, scored).score(1)[0]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_only_layers_that_there_are_can_be_taken_note_of(kind: str) -> None:
    program = loaded(file_of(kind))
    given = ProgramInput(input_of(kind), origin=ENTERED_0)
    run = program.begin(given, program.new_memory())
    assert (run.remember(0).ops > 0) == (kind in ("rollout", "farsight"))
    with pytest.raises(CommandError) as caught:
        run.remember(LAYERS)
    assert caught.value.status is Status.INVALID_FIELD


@pytest.mark.parametrize("kind", ["rollout", "farsight"])
def test_a_new_text_is_as_if_the_host_were_new(kind: str) -> None:
    program = loaded(file_of(kind))
    memory = program.new_memory()
    for at, (first, rows) in enumerate(TALK):
        given = ProgramInput(random(at, rows, HIDDEN), first, ENTERED_0)
        program.begin(given, memory).score(LAYERS - 1)
    anew = ProgramInput(random(99, 2, HIDDEN), 0, ENTERED_0)
    np.testing.assert_array_equal(
        program.begin(anew, memory).score(LAYERS - 1)[0],
        program.begin(anew, program.new_memory()).score(LAYERS - 1)[0],
    )


def test_a_rollout_passes_each_layer_once() -> None:
    program = loaded(file_of("rollout"))
    given = ProgramInput(input_of("rollout"), origin=Origin(0, behind_attention=True))
    near, far = (program.begin(given, program.new_memory()) for _ in range(2))
    one_by_one = [near.score(layer)[1] for layer in range(LAYERS)]
    at_once = far.score(LAYERS - 1)[1]
    assert sum(cost.ops for cost in one_by_one) == at_once.ops
    assert sum(cost.dram_bytes for cost in one_by_one) == at_once.dram_bytes
    assert far.score(0)[1].ops == 0


def test_a_rollout_says_what_it_misses() -> None:
    program = loaded(file_of("rollout"))
    hidden = input_of("rollout")
    for origin in (None, Origin(LAYERS, behind_attention=False)):
        with pytest.raises(CommandError) as caught:
            scores_of(program, hidden, 0, origin=origin)
        assert caught.value.status is Status.INVALID_FIELD
    with pytest.raises(CommandError, match="lies before layer 1"):
        scores_of(program, hidden, 0, origin=Origin(1, behind_attention=True))


@pytest.mark.parametrize("kind", ["rollout", "farsight"])
def test_rows_and_positions_are_bounded(kind: str) -> None:
    program = loaded(file_of(kind))
    for rows, first in ((SHAPE.context + 1, 0), (1, (1 << 64) - 1)):
        with pytest.raises(CommandError) as caught:
            scores_of(program, input_of(kind, rows), 0, token=first)
        assert caught.value.status is Status.INVALID_FIELD


# ---- correction -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", sorted(BITS))
def test_a_correction_is_what_the_other_units_add(kind: str, rows: int) -> None:
    program, inputs = loaded(file_of(kind)), input_of(kind, rows)
    for computed in ([], [0, 5, UNITS - 1], list(range(1, UNITS)), list(range(UNITS))):
        values, cost = program.correct(1, inputs, np.array(computed, np.uint32))
        expected = FfnReference(1, BITS[kind]).correction(inputs, np.array(computed, int))
        assert values.dtype == np.float32
        assert values.shape == inputs.shape
        assert np.abs(values - expected).max() <= 2e-5 * max(np.abs(expected).max(), 1e-9)
        assert cost.ops == 6 * (UNITS - len(computed)) * HIDDEN * rows


def test_correction_and_computed_units_make_the_whole() -> None:
    program, ffn = loaded(shadow_file(8, scaled=False)), FfnReference(0, 8, scaled=False)
    inputs = rms_norm(random(3, 2, HIDDEN), ffn.norm).astype(np.float32)
    computed = np.arange(0, UNITS, 3, dtype=np.uint32)
    activities = ffn.activities(inputs.astype(np.float64))
    own = activities[:, computed] @ ffn.down[computed]
    values, _ = program.correct(0, inputs, computed)
    assert_close(own + values, activities @ ffn.down)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BITS])
def test_other_kinds_cannot_correct(kind: str) -> None:
    with pytest.raises(CommandError, match="cannot correct") as caught:
        loaded(file_of(kind)).correct(0, input_of(kind), np.empty(0, np.uint32))
    assert caught.value.status is Status.INVALID_FIELD


# ---- hostile files ----------------------------------------------------------------------------


def refused(data: bytes) -> CommandError:
    with pytest.raises(CommandError) as caught:
        loaded(data)
    assert caught.value.status in REFUSALS
    assert len(caught.value.detail) < 1000
    return caught.value


def header_of(data: bytes) -> tuple[dict, bytes]:
    """The header and the bytes of the tensors."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(text: bytes, payload: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + payload


def rebuilt(data: bytes, metadata: dict[str, str], tensors: dict[str, np.ndarray]) -> bytes:
    """The file with some tensors or metadata replaced."""
    return save(load(data) | tensors, header_of(data)[0]["__metadata__"] | metadata)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_or_longer_file_is_refused(kind: str) -> None:
    data = file_of(kind)
    header, payload = header_of(data)
    start = len(data) - len(payload)
    ends = {entry["data_offsets"][1] for name, entry in header.items() if name[0] != "_"}
    cuts = {0, 4, 8, start // 2, start} | {start + end - 1 for end in ends}
    cuts |= {start + end for end in ends if end < len(payload)}
    for cut in cuts:
        refused(data[:cut])
    refused(data + b"\0")
    refused(data + data)


@pytest.mark.parametrize("kind", KINDS)
def test_each_tensor_is_checked(kind: str) -> None:
    """Missing, of another shape or dtype, not finite, unknown, named twice, lying on another."""
    data = file_of(kind)
    tensors = load(data)
    metadata = header_of(data)[0]["__metadata__"]
    last = f".{LAYERS - 1}"
    of_one_layer = [name for name in tensors if name.endswith(last) or "." not in name]
    optional = ("_bias", "channel_scale")
    for name in of_one_layer:
        values = tensors[name]
        only = {other: tensors[other] for other in tensors if other != name}
        if not any(word in name for word in optional) and not whole_layer(kind, name):
            error = refused(save(only, metadata))
            assert name in error.detail or name == f"norm{last}"
        spoiled = [values.astype(np.int64), np.append(values, values[-1:], axis=0)[None]]
        if values.dtype != np.uint8:
            spoiled += [np.full_like(values, np.nan), np.full_like(values, -np.inf)]
        for other in spoiled:
            refused(save(only | {name: other}, metadata))
    refused(save(tensors | {"surprise.0": np.zeros(3, np.float32)}, metadata))
    refused(save({}, metadata))


def whole_layer(kind: str, name: str) -> bool:
    """Whether a file without this tensor is a file without this layer."""
    alone = {"frequency": "counts", "window": "counts", "oracle": "down_norm", "farsight": "head"}
    return name.rpartition(".")[0] == alone.get(kind) or (kind[:6] == "shadow" and "down." in name)


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_is_checked(kind: str) -> None:
    data = file_of(kind)
    metadata = header_of(data)[0]["__metadata__"]
    for key in metadata:
        for text in ("", "nan", "-1", "1e999", "9" * 30, "\N{ARABIC-INDIC DIGIT FOUR}", "x" * 9000):
            if key != "csd.model" or not text:
                assert refused(rebuilt(data, {key: text}, {})), (key, text)
    assert refused(rebuilt(data, {"csd.version": "2"}, {})).status is Status.INVALID_PROGRAM_TYPE


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_is_checked(kind: str) -> None:
    data = file_of(kind)
    header, payload = header_of(data)
    text = json.dumps(header).encode()
    assert loaded(with_header(text, payload)).kind == kind.partition("-")[0]
    name = next(name for name in header if name[0] != "_")
    twice = text[:-1] + b', "' + name.encode() + b'": ' + json.dumps(header[name]).encode() + b"}"
    offsets = header[name]["data_offsets"]
    hostile = [twice, text.replace(b"csd.model", b"csd.kind\\u0000"), text[:-1], b"[]", b"\xff\xfe"]
    for moved in ([0, 1 << 62], [offsets[0] + 4, offsets[1] + 4], [offsets[1], offsets[0]], None):
        changed = header | {name: header[name] | {"data_offsets": moved}}
        hostile.append(json.dumps(changed).encode())
    for other in hostile:
        refused(with_header(other, payload))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_changed_bytes_are_refused_or_score_all_the_same(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    file = bytearray(file_of(kind))
    header_bytes = 8 + int.from_bytes(file[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        in_header = data.draw(st.booleans())
        last = header_bytes if in_header else len(file)
        file[data.draw(st.integers(0, last - 1))] = data.draw(st.integers(0, 255))
    try:
        program = loaded(bytes(file))
        scores = scores_of(program, input_of(kind), program.layers[-1])
    except CommandError:
        return
    assert scores.shape == (program.unit_count(program.layers[-1]),)
    assert not np.isnan(scores).any()


# ---- on a drive -------------------------------------------------------------------------------

OpenDrive = Callable[[], Drive]


@pytest.fixture
def open_drive(tmp_path: Path) -> Iterator[OpenDrive]:
    """Opens the drive, or opens it again on the same media; it holds the packed model."""
    opened: list[tuple[DeviceDrive, InProcessLink]] = []

    def close_all() -> None:
        for device, link in opened:
            link.close()
            device.close()
        opened.clear()

    def open_it() -> Drive:
        close_all()
        device = DeviceDrive.open(
            load_config("tiny"),
            tmp_path / "drive.csd",
            clock=VirtualClock(),
            time_mode=TimeMode.VIRTUAL,
            window_path=tmp_path / "window",
        )
        opened.append((device, InProcessLink(Endpoint(device))))
        return Drive(opened[-1][1])

    with_model = open_it()
    with_model.write(0, IMAGE)
    with_model.flush()
    yield open_it
    close_all()


IMAGE = packed_image()
PROGRAM, LAYER = 5, 1
TOLD = Told(origin=ToldOrigin(0, behind_attention=False))


def chosen_units(drive: Drive, kind: str, keep: float = 0.25) -> list[int]:
    hidden = input_of(kind, 2)
    return drive.execute_program(PROGRAM, 1, LAYER, hidden, keep, TOLD).result().tolist()


def best_units(kind: str) -> list[int]:
    scores = REFERENCES[kind](LAYER, input_of(kind, 2))
    return sorted(np.argsort(-scores, kind="stable")[: UNITS // 4].tolist())


def failure(call: Callable[[], object]) -> CommandFailed:
    with pytest.raises(CommandFailed) as caught:
        call()
    return caught.value


def dram(drive: Drive) -> dict[str, int]:
    return drive.identify(Cns.WINDOW)["dram"]


@pytest.mark.parametrize("kind", KINDS)
def test_life_on_a_drive(kind: str, open_drive: OpenDrive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_drive, "_PROGRAM_CHUNK_BYTES", 1000)
    drive, data = open_drive(), file_of(kind)
    before = dram(drive)
    drive.load_program(PROGRAM, data, activate=False)
    assert failure(lambda: chosen_units(drive, kind)).status is Status.PROGRAM_NOT_ACTIVATED
    drive.activate_program(PROGRAM)
    assert chosen_units(drive, kind) == best_units(kind)
    listed = drive.programs()

    drive = open_drive()
    assert drive.programs() == listed
    assert listed[0]["kind"] == kind.partition("-")[0]
    assert dram(drive)[f"program.{PROGRAM}"] == len(data)
    assert chosen_units(drive, kind) == best_units(kind)
    target = StageTarget(site_of(kind, LAYER), keep=0.25)
    staged = drive.predict_and_stage(1, PROGRAM, 0, input_of(kind, 2), [target], told=TOLD).result()
    assert staged.sites[0].predicted.tolist() == best_units(kind)
    assert staged.timing.program_ns > 0
    drive.release(staged.leases)

    drive.unload_program(PROGRAM)
    assert failure(lambda: chosen_units(drive, kind)).status is Status.NO_PROGRAM
    residency = {name for name in dram(drive) if name.startswith(("memory", "program"))}
    assert not residency
    assert sum(before.values()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files_leave_the_drive_going(kind: str, open_drive: OpenDrive) -> None:
    drive, data = open_drive(), file_of(kind)
    free = dram(drive)["free"]
    spoiled = {
        "truncated": data[:-3],
        "longer": data + b"xx",
        "not a number": rebuilt(data, {}, {"norm.0": np.full(HIDDEN, np.nan, np.float32)}),
        "version": rebuilt(data, {"csd.version": "9"}, {}),
        "kind": rebuilt(data, {"csd.program": "pickle"}, {}),
        "no model": rebuilt(data, {"csd.model": ""}, {}),
        "random": np.random.default_rng(1).bytes(3000),
    }
    for name, hostile in spoiled.items():
        error = failure(lambda hostile=hostile: drive.load_program(PROGRAM, hostile))
        assert error.status in REFUSALS, (name, error)
    assert drive.programs() == []
    assert dram(drive)["free"] == free
    drive.load_program(PROGRAM, data)
    assert chosen_units(drive, kind) == best_units(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_of_another_model_is_refused(kind: str, open_drive: OpenDrive) -> None:
    drive = open_drive()
    drive.load_program(PROGRAM, file_of(kind, model="another"))
    hidden, target = input_of(kind, 2), StageTarget(site_of(kind, LAYER), keep=0.25)
    calls = [
        lambda: chosen_units(drive, kind),
        lambda: drive.predict_and_stage(1, PROGRAM, 0, hidden, [target], told=TOLD).result(),
        lambda: drive.correct(PROGRAM, 1, LAYER, hidden, np.empty(0, np.uint32)).result(),
    ]
    for call in calls:
        error = failure(call)
        assert error.status is Status.INVALID_FIELD
        assert "was fitted to another, and the command names m" in str(error)
    assert drive.alive()


def test_a_program_of_another_shape_is_refused(open_drive: OpenDrive) -> None:
    drive = open_drive()
    drive.load_program(PROGRAM, encode_frequency(MODEL, {LAYER: np.arange(UNITS + 1)}))
    error = failure(lambda: chosen_units(drive, "frequency"))
    assert error.status is Status.INVALID_FIELD
    assert "does not score the 48 units of layers.1.ffn" in str(error)


def test_heads_are_scored_by_programs_of_heads(open_drive: OpenDrive) -> None:
    drive = open_drive()
    counted = encode_frequency(MODEL, {LAYER: np.array([1, 4, 2, 3])}, role=Role.HEADS)
    drive.load_program(PROGRAM, counted)
    hidden = input_of("frequency")
    assert drive.execute_program(PROGRAM, 1, LAYER, hidden, 0.5).result().tolist() == [1, 3]
    for site, wanted in ((heads_site(LAYER), [1, 3]), (ffn_site(LAYER), None)):
        pending = drive.predict_and_stage(1, PROGRAM, 0, hidden, [StageTarget(site, keep=0.5)])
        if wanted is None:
            assert failure(pending.result).status is Status.INVALID_FIELD
        else:
            assert pending.result().sites[0].predicted.tolist() == wanted


def test_heads_may_be_left_to_a_program_of_their_own(open_drive: OpenDrive) -> None:
    drive = open_drive()
    drive.load_program(PROGRAM, file_of("shadow"))
    counted = encode_frequency(MODEL, {LAYER: np.array([1, 4, 2, 3])}, role=Role.HEADS)
    drive.load_program(PROGRAM + 1, counted)
    targets = [StageTarget(site(LAYER), keep=0.25) for site in (heads_site, ffn_site)]
    hidden = input_of("shadow", 2)

    def staged(heads: int | None) -> Any:
        told = Told(heads=heads)
        return drive.predict_and_stage(1, PROGRAM, 0, hidden, targets, told=told).result()

    groups, units = staged(PROGRAM + 1).sites
    assert groups.predicted.tolist() == [1]
    assert units.predicted.tolist() == best_units("shadow")
    assert "does not score the 4 units of layers.1.heads" in str(failure(lambda: staged(None)))
    assert failure(lambda: staged(PROGRAM + 2)).status is Status.NO_PROGRAM
    drive.load_program(PROGRAM, file_of("rollout"))  # of two KV groups; the model has four
    assert failure(lambda: staged(PROGRAM)).status is Status.INVALID_FIELD


def test_dram_that_is_not_there_is_refused_with_figures(open_drive: OpenDrive) -> None:
    drive = open_drive()
    free = dram(drive)["free"]
    error = failure(lambda: drive.load_program(PROGRAM, bytes(free + 1)))
    assert error.status is Status.INSUFFICIENT_PROGRAM_RESOURCES
    assert f"program.{PROGRAM} asks for" in str(error)
    assert "are free" in str(error)
    larger = bytes(drive.identify(Cns.WINDOW)["dram"]["total"] + 1)
    assert failure(lambda: drive.load_program(PROGRAM, larger)).status is Status.PROGRAM_TOO_BIG
    assert dram(drive)["free"] == free


def test_memory_that_is_not_there_is_refused_with_figures(open_drive: OpenDrive) -> None:
    drive = open_drive()
    hungry = rebuilt(file_of("rollout"), {"csd.context": "131072"}, {})
    drive.load_program(PROGRAM, hungry)
    error = failure(lambda: chosen_units(drive, "rollout"))
    assert error.status is Status.DRAM_EXCEEDED
    assert f"memory.{PROGRAM}" in str(error)
    drive.load_program(PROGRAM, file_of("rollout"))
    assert chosen_units(drive, "rollout") == best_units("rollout")


@pytest.mark.parametrize("kind", ["window", "rollout", "farsight"])
def test_what_is_remembered_is_charged_and_goes_with_the_host(
    kind: str, open_drive: OpenDrive
) -> None:
    drive = open_drive()
    drive.load_program(PROGRAM, file_of(kind))
    loads_the_models_tables = drive.stage(1, [StageTarget(0, all=True)])
    drive.release(loads_the_models_tables.result().leases)
    before = dram(drive)["free"]
    chosen_units(drive, kind)
    other = Drive(drive._link)
    chosen_units(other, kind)
    memory_bytes = loaded(file_of(kind)).memory_bytes
    assert dram(drive)["free"] == before - 2 * memory_bytes
    other._queue.close()
    assert dram(drive)["free"] == before - memory_bytes
    drive.load_program(PROGRAM, file_of(kind))
    assert dram(drive)["free"] == before


def test_observed_units_reach_the_window(open_drive: OpenDrive) -> None:
    drive = open_drive()
    drive.load_program(PROGRAM, encode_window(MODEL, {LAYER: np.zeros(UNITS)}, tokens=2, decay=0.5))
    hidden, target = input_of("window"), StageTarget(ffn_site(LAYER), keep=2 / UNITS)
    told = Told(observed={ffn_site(LAYER): np.array([7, 40], np.uint32)})
    staged = drive.predict_and_stage(1, PROGRAM, 0, hidden, [target], told=told).result()
    assert staged.sites[0].predicted.tolist() == [7, 40]
    told = Told(observed={ffn_site(LAYER): np.array([3, 40], np.uint32)})
    units = drive.execute_program(PROGRAM, 1, LAYER, hidden, 2 / UNITS, told).result()
    assert units.tolist() == [3, 40]
    for site, units in ((ffn_site(LAYER), [UNITS]), (ffn_site(LAYER), [4, 3]), (99, [0])):
        told = Told(observed={site: np.array(units, np.uint32)})
        pending = drive.predict_and_stage(1, PROGRAM, 0, hidden, [target], told=told)
        assert failure(pending.result).status in {Status.INVALID_FIELD, Status.NO_SITE}


@pytest.mark.parametrize("kind", ["shadow-3", "rollout"])
def test_a_correction_comes_over_the_link_and_costs_time(kind: str, open_drive: OpenDrive) -> None:
    drive = open_drive()
    drive.load_program(PROGRAM, file_of(kind))
    inputs, computed = input_of(kind, 2), np.arange(0, UNITS, 5, dtype=np.uint32)
    values = drive.correct(PROGRAM, 1, LAYER, inputs, computed).result()
    expected = FfnReference(LAYER, BITS[kind]).correction(inputs, computed)
    assert_close(values, expected)
    one_row = drive.correct(PROGRAM, 1, LAYER, inputs[0], computed).result()
    assert one_row.shape == (HIDDEN,)
    for units in ([3, 3], [UNITS]):
        wrong = drive.correct(PROGRAM, 1, LAYER, inputs, np.array(units, np.uint32))
        assert failure(wrong.result).status is Status.INVALID_FIELD
    spoiled = inputs.copy()
    spoiled[0, 0] = np.nan
    pending = drive.correct(PROGRAM, 1, LAYER, spoiled, computed)
    assert failure(pending.result).status is Status.INVALID_FIELD
