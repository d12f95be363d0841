"""A LLaMA of any size with random weights, as a Hugging Face folder."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from host_client.model.source import Source, resolve_source


def save_random_llama(folder: Path, **sizes: int) -> Source:
    """`sizes` are LlamaConfig's fields. Weights are float16, the output head tied."""
    torch.manual_seed(0)
    config = LlamaConfig(tie_word_embeddings=True, **sizes)
    values = LlamaForCausalLM(config).half().state_dict()
    del values["lm_head.weight"]  # tied
    config.save_pretrained(folder)
    save_file(values, folder / "model.safetensors")
    return resolve_source(folder)
