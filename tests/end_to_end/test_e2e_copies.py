"""`csd pack --copies 2`, a bit that turns over on the flash, and then one more.

A small random model with the example's tokenizer; a drive of its own.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from real_model import CommandLine, Device, flip_bit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from csd_protocol.packed import Role
from host_client.driver import Drive
from host_client.model.catalog import open_model

NAME, LAYER, UNIT = "twice", 1, 40
DAMAGED = 6


@pytest.fixture
def folder(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    path = tmp_path / NAME
    LlamaForCausalLM(config).half().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Device]:
    device = Device(tmp_path / "drive.csd", "tiny")
    yield device
    device.close()


def test_what_one_copy_loses_the_other_has_and_what_both_lose_stops(
    csd: CommandLine, drive: Device, folder: Path
) -> None:
    packed = csd("pack", folder, "--copies", 2, "--no-calibrate", drive=drive)
    assert packed.status == 0, packed.stderr
    assert "as float16, in 2 copies: 12." in packed.stdout
    ask = ("generate", folder, "--prompt", "The sea", "--raw", "--max-new-tokens", 4)
    before = csd(*ask, "--json", drive=drive).answer
    assert (before["recovered_units"], before["drive"]["units_from_copies"]) == (0, 0)
    whole = csd("verify", folder, drive=drive)
    assert (whole.status, "are as they were packed" in whole.stdout) == (0, True)

    damage(drive)
    after = csd(*ask, "--json", drive=drive).answer
    assert after["token_ids"] == before["token_ids"]
    assert after["recovered_units"] == 1
    assert (
        csd(*ask, "--json", drive=drive).answer["recovered_units"] == 0
    )  # the drive's DRAM has it
    drive.restart()
    said = " ".join(csd(*ask, drive=drive).stderr.split())
    assert "1 lost in one copy, read from another" in said
    assert lost_of(csd, drive, folder) == (1, [])

    damage(drive)
    message = csd(*ask, drive=drive).refused(DAMAGED)
    where = f"unit {UNIT} of layers.{LAYER}.ffn: unreadable in all of its 2 copies"
    assert f"{NAME} has lost {where}" in message
    assert lost_of(csd, drive, folder) == (
        2,
        [{"site": f"layers.{LAYER}.ffn", "layer": LAYER, "units": [UNIT]}],
    )
    listed = " ".join(csd("models", drive=drive).stdout.split())
    assert f"{NAME} │ complete │ 2" in listed


def damage(drive: Device) -> None:
    """Turns a bit of one neuron in the first copy on the flash that is still whole."""
    with Drive.connect(drive.address) as connected:
        _, model = open_model(connected, NAME)
        site = model.find(Role.FFN, LAYER)
        copies = [
            connected.read(model.place_of(site, copy) + UNIT * site.unit_bytes, site.unit_bytes)
            for copy in (0, 1)
        ]
    drive.kill()
    flip_bit(drive.media / "nand.img", copies[1])  # what it has in the copy not yet changed
    drive.restart()


def lost_of(csd: CommandLine, drive: Device, folder: Path) -> tuple[int, list[dict[str, Any]]]:
    run = csd("verify", folder, "--json", drive=drive)
    assert run.status == DAMAGED
    report = json.loads(run.stdout)
    return report["damaged_units"], report["lost"]
