"""The daemon's memory: the emulated DRAM, and the overhead that docs/ARCHITECTURE.md states."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from csd_protocol.opcodes import Cns
from csd_protocol.units import MIB
from host_client.driver import Drive, StageTarget
from host_client.model.catalog import open_model
from host_client.model.formats import open_checkpoint
from host_client.model.packer import pack
from host_client.model.source import resolve_source

if "CSD_DRIVE" in os.environ:
    pytest.skip("the daemon is elsewhere: its memory cannot be read", allow_module_level=True)

# Interpreter, libraries, compiled kernels and scratch; and, on top, NAND pages that are mapped.
OVERHEAD_BYTES = 192 * MIB
MAPPED_NAND_BYTES = 256 * MIB


def memory_of(pid: int) -> dict[str, int]:
    """Bytes by the kernel's names: VmHWM, RssAnon, RssFile, RssShmem."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    words = [line.split() for line in lines if line.startswith(("VmHWM", "Rss"))]
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, *_ in words}


def save_model_larger_than_dram(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=256,
        tie_word_embeddings=True,
    )
    values = LlamaForCausalLM(config).half().state_dict()
    del values["lm_head.weight"]
    config.save_pretrained(folder)
    save_file(values, folder / "model.safetensors")
    return folder


def test_staging_a_model_larger_than_dram_stays_within_dram_and_overhead(tmp_path: Path) -> None:
    source = resolve_source(save_model_larger_than_dram(tmp_path / "model"))
    with Drive.embedded(tmp_path / "drive.csd", drive="tiny", time="off") as drive:
        with open_checkpoint(source) as checkpoint:
            pack(checkpoint, drive, source.name)
        model_id, model = open_model(drive, source.name)
        dram_bytes = drive.identify(Cns.WINDOW)["dram"]["total"]
        assert model.weights_bytes > 2 * dram_bytes
        for _ in range(2):
            for site in model.sites:
                target = StageTarget(site=site.site, all=True)
                staged = drive.stage(model_id, [target]).result()
                assert staged.sites[0].length_bytes == site.length_bytes
                drive.release(staged.leases)
        assert drive.daemon_pid is not None
        memory = memory_of(drive.daemon_pid)
    assert memory["RssAnon"] + memory["RssShmem"] < dram_bytes + OVERHEAD_BYTES
    assert memory["VmHWM"] < dram_bytes + OVERHEAD_BYTES + MAPPED_NAND_BYTES
