"""The daemon is killed while a rollout guides: its keys and values are gone, the text goes on."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from host_client import CsdModelForCausalLM, Drive
from host_client.calibrate.predictor import load_predictor
from host_client.calibrate.preparation import build_predictor
from host_client.driver import DriveLost
from host_client.model.formats import open_checkpoint
from host_client.model.packer import pack
from host_client.model.source import resolve_source

DEADLINE_S = 60.0
PROMPT, DECODED = 12, 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    torch.manual_seed(11)
    LlamaForCausalLM(config).half().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def start(tmp_path: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "csd_device.service", "serve", "--drive", "tiny"),
            *("--media", str(tmp_path / "d.csd"), "--listen", f"unix:{tmp_path / 's'}"),
        ],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"ready: tiny at unix:")
    return process


def prepare(drive: Drive, folder: Path) -> str:
    source = resolve_source(folder)
    with open_checkpoint(source) as checkpoint:
        packed = pack(checkpoint, drive, source.name)
    data = build_predictor(drive, packed, "rollout", lambda done, total: None)
    load_predictor(drive, packed, "rollout", data)
    drive.flush()
    return source.name


def passes(model, parts: list[torch.Tensor], cache: DynamicCache) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat(
            [model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1
        )


def test_a_text_goes_on_behind_a_daemon_that_came_back(tmp_path: Path, folder: Path) -> None:
    first = start(tmp_path)
    drive = Drive.connect(f"unix:{tmp_path / 's'}")
    name = prepare(drive, folder)
    model = CsdModelForCausalLM.from_pretrained(name, drive, "60%", "0.3+correct", context=64)
    ids = torch.randint(1, 512, (1, PROMPT + DECODED), generator=torch.Generator().manual_seed(1))
    parts = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)]
    expected = passes(model, parts, DynamicCache(config=model.config))
    cache = DynamicCache(config=model.config)
    passes(model, parts[:3], cache)
    first.kill()
    first.wait(DEADLINE_S)
    broken = DynamicCache(config=model.config)
    with pytest.raises(DriveLost):
        passes(model, parts, broken)
    second = start(tmp_path)
    drive.reconnect()
    assert passes(model, parts[3:], cache).isfinite().all()
    assert torch.equal(passes(model, parts, DynamicCache(config=model.config)), expected)
    model.csd.close()
    drive.close()
    second.terminate()
    assert second.wait(DEADLINE_S) == 0
