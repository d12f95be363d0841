"""Calibration: counts that are right, kept on the drive, and the programs made from them."""

from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from csd_protocol.packed import Bits, Role
from csd_protocol.program_file import encode_frequency
from host_client.calibrate.losses import Losses
from host_client.calibrate.predictor import build_frequency, load_predictor, read_down_norms
from host_client.calibrate.preparation import (
    Loaded,
    build_predictor,
    calibrate,
    load_predictors,
    place,
    recalibrate,
)
from host_client.calibrate.quality import decoded_losses, dense_truths
from host_client.calibrate.statistics import WANTED_SHARE, measure_frequencies
from host_client.calibrate.text import Split, default_text, token_windows
from host_client.model.catalog import (
    open_model,
    read_calibration,
    read_frequencies,
    store_frequencies,
)
from host_client.runtime.allotment import allotted
from host_client.runtime.plain_reads import PlainReads
from host_client.runtime.refusals import ContextExceeded, NoPredictor

NAME = "untied"
NEURONS, LAYERS = 130, 3


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


def dense_counts(dense: Any, windows: list[torch.Tensor]) -> np.ndarray:
    """How often each neuron is in its layer's top third, from transformers' own modules."""
    counts = np.zeros((LAYERS, NEURONS), np.int64)

    def watch(layer: int, mlp: Any) -> Any:
        norms = mlp.down_proj.weight.norm(dim=0)

        def count(_: Any, arguments: Any) -> None:
            x = arguments[0]
            scores = (torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)).abs() * norms
            best = scores.topk(round(NEURONS * WANTED_SHARE)).indices.reshape(-1)
            counts[layer] += np.bincount(best.numpy(), minlength=NEURONS)

        return mlp.register_forward_pre_hook(count)

    hooks = [watch(number, layer.mlp) for number, layer in enumerate(dense.model.layers)]
    with torch.inference_mode():
        for window in windows:
            dense(window)
    for hook in hooks:
        hook.remove()
    return counts


@pytest.fixture
def windows(lab, tokens_of) -> list[torch.Tensor]:
    return [tokens_of(lab, NAME, 40, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_counts_are_those_of_the_dense_model(lab, windows, share: float) -> None:
    model = lab.open(NAME, lab.budget(NAME, share))
    _, packed = lab.packed(NAME)
    told: list[tuple[int, int]] = []
    counts = measure_frequencies(
        model, windows, read_down_norms(lab.drive, packed), lambda *step: told.append(step)
    )
    assert counts.dtype == np.uint32
    assert counts.sum(axis=1).tolist() == [120 * round(NEURONS * WANTED_SHARE)] * LAYERS
    expected = dense_counts(lab.zoo.dense(NAME), windows)
    assert np.abs(counts.astype(np.int64) - expected).sum() <= 4  # a tie may fall either way
    assert told == [(40, 120), (80, 120), (120, 120)]


def test_a_failure_takes_the_observers_off(lab, tokens_of, windows) -> None:
    model = lab.open(NAME, context=40)
    _, packed = lab.packed(NAME)
    norms = read_down_norms(lab.drive, packed)
    with pytest.raises(ContextExceeded):
        measure_frequencies(model, [*windows, tokens_of(lab, NAME, 41)], norms, silent)
    assert all(layer.mlp.observer is None for layer in model.model.layers)


def test_norms_of_the_down_columns(lab) -> None:
    _, packed = lab.packed(NAME)
    norms = read_down_norms(lab.drive, packed)
    for layer, expected in enumerate(lab.zoo.dense(NAME).model.layers):
        torch.testing.assert_close(
            torch.from_numpy(norms[layer]), expected.mlp.down_proj.weight.norm(dim=0)
        )


def test_stored_counts_choose_what_stays_resident(make_lab) -> None:
    lab = make_lab()
    lab.packed(NAME)
    rng = np.random.default_rng(3)
    counts = np.stack([rng.permutation(NEURONS) for _ in range(LAYERS)]).astype(np.uint32)
    for round_number in range(2):
        stored = store_frequencies(lab.drive, NAME, counts, tokens=77 + round_number)
        _, packed = open_model(lab.drive, NAME)
        assert packed == stored
        assert packed.frequency_tokens == 77 + round_number
        assert np.array_equal(read_frequencies(lab.drive, packed), counts)
        model = lab.open(NAME, lab.budget(NAME, 0.5))
        for layer in range(LAYERS):
            entry = model.csd.engine.resident[packed.find(Role.FFN, layer).site]
            assert 0 < entry.units.size < NEURONS
            hottest = np.argsort(-counts[layer].astype(np.int64))[: entry.units.size]
            assert entry.units.tolist() == sorted(hottest.tolist())
        model.csd.close()
        counts = counts[:, ::-1].copy()


class ByteTokenizer:
    """A token a byte, as far as the vocabulary reaches."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def __call__(self, text: str, **_: Any) -> Any:
        ids = torch.tensor([list(text.encode())]) % self._vocabulary
        return SimpleNamespace(input_ids=ids)


def test_calibration_counts_on_the_calibration_half(make_lab) -> None:
    lab = make_lab()
    _, packed = lab.packed(NAME)
    tokenizer, tokens = ByteTokenizer(257), 512
    made = calibrate(lab.drive, packed, tokenizer, "400%", silent, tokens)
    windows = token_windows(tokenizer, default_text(Split.CALIBRATION), tokens, 256)
    assert [window.shape for window in windows] == [(1, 256)] * 2
    counts = read_frequencies(lab.drive, made)
    assert made.frequency_tokens == tokens
    expected = dense_counts(lab.zoo.dense(NAME), windows)
    assert np.abs(counts.astype(np.int64) - expected).sum() <= 8
    assert lab.leases == 0


def test_the_halves_of_the_text_share_nothing() -> None:
    """Though topics of the reference quote each other, and some have the very text of another."""
    calibration, held_out = (default_text(split) for split in Split)
    assert min(len(calibration), len(held_out)) > 50_000
    shared = [text for text in topics.values() if text in calibration and text in held_out]
    assert not shared
    paragraphs = [{*text.split("\n\n")} for text in (calibration, held_out)]
    assert not paragraphs[0] & paragraphs[1]
    with pytest.raises(ValueError, match="tokens; 9 were asked for"):
        token_windows(ByteTokenizer(257), "short", 9, 4)


def test_a_frequency_program_names_the_most_frequent(lab) -> None:
    model_id, packed = lab.packed(NAME)
    counts = np.random.default_rng(1).permuted(np.tile(np.arange(NEURONS), (LAYERS, 1)), axis=1)
    number = load_predictor(
        lab.drive, packed, "frequency", build_frequency(packed, counts.astype(np.uint32))
    )
    hidden = np.zeros((1, 96), np.float32)
    for layer in range(LAYERS):
        named = lab.drive.execute_program(number, model_id, layer, hidden, 0.2).result()
        assert named.tolist() == np.flatnonzero(counts[layer] >= NEURONS - 26).tolist()


def test_a_shadow_finds_most_of_what_its_input_wants(lab) -> None:
    """The program's own view: the FFN input is the hidden state it is given, normed."""
    model_id, packed = lab.packed(NAME)
    number = load_predictor(
        lab.drive, packed, "shadow", build_predictor(lab.drive, packed, "shadow", silent)
    )
    hidden = torch.randn(40, 96, generator=torch.Generator().manual_seed(2))
    for number_of_layer, layer in enumerate(lab.zoo.dense(NAME).model.layers):
        x = layer.post_attention_layernorm(hidden)
        gated = torch.nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
        scores = gated.abs() * layer.mlp.down_proj.weight.norm(dim=0)
        found = 0
        for row in range(40):
            state = hidden[row : row + 1].numpy()
            named = lab.drive.execute_program(
                number, model_id, number_of_layer, state, 0.3
            ).result()
            found += len(set(named.tolist()) & set(scores[row].topk(39).indices.tolist()))
        assert found / (40 * 39) > 0.85


def test_loading_predictors_replaces_earlier_ones_and_no_others(make_lab) -> None:
    lab = make_lab()
    _, packed = lab.packed(NAME)
    lab.packed("tied")
    lab.drive.load_program(1, encode_frequency("tied", {0: np.arange(160)}))

    def loaded() -> set[tuple[int, str, str, bool]]:
        keys = ("program", "kind", "model", "active")
        return {tuple(entry[key] for key in keys) for entry in lab.drive.programs()}

    others = loaded()
    assert load_predictors(lab.drive, packed, silent) == Loaded(["rollout"])
    assert loaded() == others | {(0, "rollout", NAME, True)}
    with pytest.raises(NoPredictor, match="never counted"):
        build_predictor(lab.drive, packed, "frequency", silent)
    counts = np.ones((LAYERS, NEURONS), np.uint32)
    packed = store_frequencies(lab.drive, NAME, counts, 1)
    for _ in range(2):
        assert load_predictors(lab.drive, packed, silent).kinds == ["rollout", "frequency"]
        assert {entry[1:] for entry in loaded() - others} == {
            ("rollout", NAME, True),
            ("frequency", NAME, True),
        }
        assert others < loaded()


@pytest.mark.parametrize(
    "free_bytes, kinds, skipped",
    [
        (400_000, ["rollout", "frequency"], []),
        (150_000, ["shadow", "frequency"], ["rollout"]),
        (20_000, ["frequency"], ["rollout", "shadow"]),
        (500, [], ["rollout", "shadow", "frequency"]),
    ],
)
def test_what_the_drive_cannot_hold_is_skipped_with_a_word(
    make_lab, free_bytes: int, kinds: list[str], skipped: list[str]
) -> None:
    """A rollout takes most, a text's keys and values with it; then a shadow; then counts."""
    lab = make_lab()
    lab.packed(NAME)
    counts = np.ones((LAYERS, NEURONS), np.uint32)
    packed = store_frequencies(lab.drive, NAME, counts, 1)
    arena = lab.device._controller.arena
    arena.allot("taken", arena.free_bytes - free_bytes)
    loaded = load_predictors(lab.drive, packed, silent)
    assert loaded.kinds == kinds == [entry["kind"] for entry in lab.drive.programs()]
    assert [reason.partition(":")[0] for reason in loaded.skipped] == skipped
    assert all("DRAM" in reason for reason in loaded.skipped)


def test_perplexities_agree_at_exact_quality(lab, windows) -> None:
    model, dense = lab.open(NAME), lab.zoo.dense(NAME)
    short = [window[:, :12] for window in windows]
    with torch.inference_mode():
        losses = [float(dense(window, labels=window).loss) for window in short]
    expected = float(np.exp(np.mean(losses)))
    truths = dense_truths(model, short, silent)
    in_windows = sum((truth.losses for truth in truths), Losses())
    assert in_windows.perplexity == pytest.approx(expected, rel=1e-4)
    decoded = decoded_losses(model, short, truths, silent)
    assert decoded.perplexity == pytest.approx(expected, rel=1e-4)
    assert decoded.agreed == decoded.scored == 3 * 11
    assert abs(decoded.kl) < 1e-4


# ---- the walk of `csd calibrate` ---------------------------------------------------------------


TEXT = torch.randint(0, 257, (3, 24), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def calibrated(make_lab) -> Any:
    """A lab whose model was calibrated, and its manifest."""
    lab = make_lab()
    _, packed = lab.packed(NAME)
    return lab, recalibrate(lab.drive, packed, TEXT, silent)


def whole_divergence(dense: Any, layer: int, windows: torch.Tensor) -> float:
    """KL of the whole model when one layer keeps the best third of its neurons, by hooks."""
    mlp = dense.model.layers[layer].mlp
    norms = mlp.down_proj.weight.norm(dim=0)

    def keep_a_third(_: Any, arguments: Any) -> Any:
        scores = arguments[0].abs() * norms
        best = scores.topk(round(NEURONS * WANTED_SHARE)).indices
        return arguments[0] * torch.zeros_like(scores).scatter_(-1, best, 1.0)

    with torch.inference_mode():
        truth = dense(windows).logits.log_softmax(-1)
        hook = mlp.down_proj.register_forward_pre_hook(keep_a_third)
        masked = dense(windows).logits.log_softmax(-1)
        hook.remove()
    return float((truth.exp() * (truth - masked)).sum(-1).mean())


def test_sensitivity_is_what_masking_one_layer_costs(calibrated) -> None:
    lab, packed = calibrated
    found = read_calibration(lab.drive, packed)
    third = round(NEURONS * WANTED_SHARE)
    for layer in range(LAYERS):
        measured = found.weights[layer] * found.dropped[layer, third]
        expected = whole_divergence(lab.zoo.dense(NAME), layer, TEXT)
        assert measured == pytest.approx(expected, rel=0.02)
    assert packed.frequency_tokens == TEXT.numel()


def test_a_walk_that_was_broken_off_goes_on(make_lab, tmp_path) -> None:
    lab = make_lab()
    _, packed = lab.packed(NAME)
    folder = tmp_path / "kept"

    def measured(told: Any, windows: torch.Tensor = TEXT) -> tuple[bytes, bytes]:
        stored = recalibrate(lab.drive, packed, windows, told, folder)
        counts, found = read_frequencies(lab.drive, stored), read_calibration(lab.drive, stored)
        return counts.tobytes(), found.encode()

    def break_off_after(layers: int) -> Any:
        def told(done: int, total: int) -> None:
            if done == layers:
                raise KeyboardInterrupt

        return told

    steps: list[tuple[int, int]] = []
    whole = measured(lambda *step: steps.append(step))
    assert steps == [(done, LAYERS) for done in range(LAYERS + 1)]
    assert not list(folder.iterdir())
    for layers in range(1, LAYERS + 1):
        with pytest.raises(KeyboardInterrupt):
            measured(break_off_after(layers))
        assert len(list(folder.iterdir())) == 1
        steps.clear()
        assert measured(lambda *step: steps.append(step)) == whole
        assert steps[0] == (layers, LAYERS)
    with pytest.raises(KeyboardInterrupt):
        measured(break_off_after(2))
    steps.clear()
    other = measured(lambda *step: steps.append(step), TEXT.flip(0))
    assert steps[0] == (0, LAYERS)  # of other text nothing is taken over
    assert other != whole
    with pytest.raises(KeyboardInterrupt):
        measured(break_off_after(2))
    (kept,) = folder.glob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:100])
    assert measured(silent) == whole


def test_layers_keep_what_they_were_allotted(calibrated) -> None:
    lab, packed = calibrated
    load_predictors(lab.drive, packed, silent)
    found = read_calibration(lab.drive, packed)
    for text, expected in [
        ("0.4", allotted(found, 0.4)),
        ("0.4+uniform", [NEURONS * 0.4] * LAYERS),
        ("0.4+correct", [NEURONS * 0.4] * LAYERS),
    ]:
        model = lab.open(NAME, lab.budget(NAME, 0), text)
        engine = model.csd.engine
        kept = [engine.kept_of(packed.find(Role.FFN, layer)) for layer in range(LAYERS)]
        assert [np.ceil(share * NEURONS) for share in kept] == [np.ceil(n) for n in expected]
        with torch.inference_mode():
            model(TEXT[:1, :1], use_cache=False)
        model.csd.close()
    assert sum(allotted(found, 0.4)) == LAYERS * 52
    assert len({*allotted(found, 0.4)}) > 1


def decoded(lab: Any, quality: str) -> tuple[list[int], torch.Tensor]:
    model = lab.open(NAME, lab.budget(NAME, 0.3), quality)
    out = model.generate(
        TEXT[:1],
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    model.csd.close()
    return out.sequences[0].tolist(), torch.cat(out.logits)


@pytest.mark.parametrize("copies, bits", [(1, 16), (2, 16), (1, 12), (1, 8), (1, 4)])
def test_placing_changes_no_bit_of_the_output(make_lab, copies: int, bits: Bits) -> None:
    lab = make_lab(copies=copies)
    lab.bits = bits
    _, packed = lab.packed(NAME)
    packed = recalibrate(lab.drive, packed, TEXT, silent)
    load_predictors(lab.drive, packed, silent)
    before = {quality: decoded(lab, quality) for quality in ("exact", "0.4", "0.4+correct")}
    programs = lab.drive.programs()
    counts = read_frequencies(lab.drive, packed)
    units = [PlainReads(lab.drive, packed).site_units(site) for site in packed.sites]

    placed = place(lab.drive, packed, silent)
    assert placed.placed
    reads = PlainReads(lab.drive, placed)
    for site, content in zip(placed.sites, units, strict=True):
        assert np.array_equal(reads.site_units(site), content)
        assert np.array_equal(reads.units(site, 0, 1), content[:1])
    assert reads.verify(silent) == []
    assert lab.drive.programs() == programs
    for quality, (tokens, logits) in before.items():
        again, others = decoded(lab, quality)
        assert again == tokens
        assert torch.equal(others, logits)
    measured = recalibrate(lab.drive, placed, TEXT, silent)
    assert np.array_equal(read_frequencies(lab.drive, measured), counts)
