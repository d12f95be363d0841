"""Exact quality gives plain transformers' own tokens and logits, at any budget, from any format.

By default each budget and format is seen on some prompts, so that each prompt is seen; with
CSD_FULL=1 everything is run on everything.
"""

import os

import pytest
import torch
from real_model import MODEL, Device, Reference, speak

from host_client import CsdModelForCausalLM, Drive
from host_client.model.catalog import open_model, read_unit_table

ALL = range(5)
CONTEXT = 128
LOGITS_TOLERANCE = 1e-5  # of the largest logit

SOME = [
    pytest.param("gguf", "100%", (0, 3), id="gguf-100%"),
    pytest.param("gguf", "45%", (0, 2, 4), id="gguf-45%"),
    pytest.param("gguf", "25%", (1,), id="gguf-25%"),
    pytest.param("safetensors", "45%", (2,), id="safetensors-45%"),
]
FULL = [
    pytest.param(form, budget, ALL, id=f"{form}-{budget}")
    for form in ("gguf", "safetensors")
    for budget in ("100%", "45%", "25%")
]


@pytest.mark.parametrize("form, budget, which", FULL if "CSD_FULL" in os.environ else SOME)
def test_exact_is_plain_transformers(
    device: Device, reference: Reference, form: str, budget: str, which: tuple[int, ...]
) -> None:
    name = MODEL if form == "gguf" else reference.folder.name
    model = CsdModelForCausalLM.from_pretrained(name, device.address, budget, context=CONTEXT)
    try:
        for number in which:
            dense = reference.spoken[number]
            ours = speak(model, dense.prompt)
            assert ours.tokens == dense.tokens, f"prompt {number}"
            worst = (ours.logits - dense.logits).abs().max() / dense.logits.abs().max()
            assert worst <= LOGITS_TOLERANCE, f"prompt {number}: logits differ by {worst}"
        runtime = model.csd
        assert runtime.weights_bytes <= runtime.plan.budget_bytes
        assert runtime.tally.late_units == 0
    finally:
        model.csd.close()


def test_a_batch_is_plain_transformers_too(device: Device, reference: Reference) -> None:
    """Two rows of the same prompt, so that no padding enters."""
    dense = reference.spoken[3]
    prompt = dense.prompt.repeat(2, 1)
    model = CsdModelForCausalLM.from_pretrained(MODEL, device.address, context=2 * CONTEXT)
    try:
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
        for row in output:
            assert row[prompt.shape[1] :].tolist() == dense.tokens[:8]
    finally:
        model.csd.close()


def test_both_formats_pack_to_the_same_units(device: Device, reference: Reference) -> None:
    with Drive.connect(device.address) as drive:
        _, gguf = open_model(drive, MODEL)
        _, folder = open_model(drive, reference.folder.name)
        assert gguf.dtype == folder.dtype == "float16"
        assert gguf.fingerprint != folder.fingerprint
        assert (read_unit_table(drive, gguf).crcs == read_unit_table(drive, folder).crcs).all()
    assert len(list(reference.folder.glob("*.safetensors"))) > 2
