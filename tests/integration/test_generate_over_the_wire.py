"""A model goes onto the drive and comes back as text, through the socket and the window."""

import time
import uuid
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from csd_protocol import opcodes
from host_client import CsdModelForCausalLM, Drive
from host_client.calibrate.predictor import load_predictor
from host_client.calibrate.preparation import build_predictor
from host_client.model.catalog import list_models, remove_model
from host_client.model.formats import open_checkpoint
from host_client.model.packer import pack
from host_client.model.source import resolve_source

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA in float16, with random weights; its name is new to any drive."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=256,
    )
    torch.manual_seed(11)
    path = tmp_path_factory.mktemp("models") / f"small-{uuid.uuid4().hex[:8]}"
    LlamaForCausalLM(config).half().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return torch.tensor([[1, 17, 301, 44, 9, 260, 5, 77]])


@pytest.fixture(scope="module")
def dense_tokens(folder: Path, prompt: torch.Tensor) -> list[int]:
    """What plain transformers says, in float32 from the same 16-bit weights."""
    return answer(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), prompt)


@pytest.fixture(scope="module")
def packed(drive_address: str, folder: Path):
    """The model on the shared drive, with a shadow program; both are taken off again."""
    source = resolve_source(folder)
    with Drive.connect(drive_address) as drive:
        with open_checkpoint(source) as checkpoint:
            model = pack(checkpoint, drive, source.name)
        program = load_predictor(
            drive, model, "shadow", build_predictor(drive, model, "shadow", ignore)
        )
        yield model
        drive.unload_program(program)
        remove_model(drive, model.name)


def ignore(done: int, total: int) -> None:
    pass


def answer(model, prompt: torch.Tensor) -> list[int]:
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return made[0, prompt.shape[1] :].tolist()


def leases_within(drive: Drive, seconds: float) -> int:
    """Leases left once there are none, or after `seconds`: a drive learns of an end on its own."""
    deadline = time.monotonic() + seconds
    while (leases := drive.identify(opcodes.Cns.WINDOW)["leases"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return leases


@pytest.mark.parametrize("dram", ["100%", "60%"])
def test_exact_gives_the_dense_tokens(
    drive_address: str, packed, prompt: torch.Tensor, dense_tokens: list[int], dram: str
) -> None:
    model = CsdModelForCausalLM.from_pretrained(packed.name, drive_address, dram, context=64)
    try:
        assert answer(model, prompt) == dense_tokens
    finally:
        model.csd.close()


def test_a_kept_fraction_is_predicted_and_staged(
    drive_address: str, packed, prompt: torch.Tensor
) -> None:
    model = CsdModelForCausalLM.from_pretrained(
        packed.name, drive_address, "60%", quality="0.5", context=64
    )
    try:
        assert len(answer(model, prompt)) == NEW_TOKENS
        assert model.csd.predictor == "shadow"
    finally:
        model.csd.close()


def test_no_lease_is_left_behind(drive_address: str, packed) -> None:
    with Drive.connect(drive_address) as drive:
        assert packed.name in {entry.name for entry in list_models(drive)}
        model = CsdModelForCausalLM.from_pretrained(packed.name, drive, "60%", context=64)
        model.csd.close()
    with Drive.connect(drive_address) as drive:
        assert leases_within(drive, seconds=10.0) == 0
