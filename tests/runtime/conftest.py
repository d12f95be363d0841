"""Tiny LLaMA models on a drive in this process, and what plain transformers makes of them."""

import copy
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from csd_device.clock import TimeMode, VirtualClock
from csd_device.config import load_config
from csd_device.drive import Drive as DeviceDrive
from csd_device.service.endpoint import Endpoint
from csd_protocol.opcodes import Cns
from csd_protocol.packed import Bits, PackedModel
from csd_protocol.units import MIB
from host_client import CsdModelForCausalLM
from host_client.driver import Drive
from host_client.driver.link import InProcessLink
from host_client.model.catalog import list_models, open_model
from host_client.model.packer import pack
from host_client.model.safetensors_folder import SafetensorsFolder
from host_client.runtime.plan import make_plan
from host_client.runtime.refusals import BudgetTooSmall

CONTEXT = 64
AMPLE_BYTES = 1 << 30

_ROPE_OF_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# Tied and untied heads, both 16-bit types, one KV group and several, odd sizes. The head of
# `slices` is larger than a staging buffer.
SHAPES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "tied": (torch.float16, {"vocab_size": 300, "tie_word_embeddings": True}),
    "untied": (
        torch.bfloat16,
        {
            "hidden_size": 96,
            "intermediate_size": 130,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "vocab_size": 257,
        },
    ),
    "slices": (
        torch.bfloat16,
        {
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "vocab_size": 20011,
            "tie_word_embeddings": True,
        },
    ),
    "scaled": (
        torch.float16,
        {"intermediate_size": 101, "head_dim": 24, "rope_parameters": _ROPE_OF_LLAMA_3},
    ),
}


def make_dense(name: str) -> LlamaForCausalLM:
    """Random weights of a size that makes every part of the model matter."""
    dtype, changes = SHAPES[name]
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 131,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "initializer_range": 0.12,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(sorted(SHAPES).index(name))
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    return model.to(dtype)


class Zoo:
    """The models as folders of safetensors, and as transformers models in float32."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._dense: dict[str, LlamaForCausalLM] = {}

    def folder(self, name: str) -> Path:
        path = self._root / name
        if not path.exists():
            make_dense(name).save_pretrained(path)
        return path

    def dense(self, name: str) -> LlamaForCausalLM:
        """The same 16-bit weights, computed in float32."""
        if name not in self._dense:
            loaded = LlamaForCausalLM.from_pretrained(self.folder(name), dtype=torch.float32)
            self._dense[name] = loaded.eval()
        return self._dense[name]


@dataclass
class Lab:
    """One drive in this process, connected; models go onto it when they are first asked for."""

    zoo: Zoo
    device: DeviceDrive
    link: InProcessLink
    drive: Drive
    image: Path  # the NAND's bytes
    copies: int = 1  # in which models are packed
    bits: Bits = 16  # of their units
    opened: list[PreTrainedModel] = field(default_factory=list)

    def packed(self, name: str) -> tuple[int, PackedModel]:
        if name not in self._names():
            with SafetensorsFolder(self.zoo.folder(name)) as checkpoint:
                pack(checkpoint, self.drive, name, bits=self.bits, copies=self.copies)
        return open_model(self.drive, name)

    def open(self, name: str, dram: str | int = AMPLE_BYTES, *args: Any, **settings: Any) -> Any:
        self.packed(name)
        settings.setdefault("context", CONTEXT)
        model = CsdModelForCausalLM.from_pretrained(name, self.drive, dram, *args, **settings)
        self.opened.append(model)
        return model

    def budget(self, name: str, share: float, context: int = CONTEXT) -> int:
        """Between the smallest budget that works (0) and the one that keeps everything (1)."""
        _, packed = self.packed(name)
        with pytest.raises(BudgetTooSmall) as refusal:
            make_plan(packed, 0, context)
        smallest = refusal.value.smallest_bytes
        whole = make_plan(packed, AMPLE_BYTES, context).total_bytes
        return int(smallest + share * max(0, whole - smallest))

    @property
    def leases(self) -> int:
        leases: int = self.drive.identify(Cns.WINDOW)["leases"]
        return leases

    def put_back(self) -> None:
        """Closes models, takes programs off."""
        while self.opened:
            self.opened.pop().csd.close()
        for entry in self.drive.programs():
            self.drive.unload_program(entry["program"])

    def _names(self) -> set[str]:
        return {entry.name for entry in list_models(self.drive)}


MakeLab = Callable[..., Lab]


def open_lab(zoo: Zoo, folder: Path, window_bytes: int, unit_cache_bytes: int) -> Lab:
    config = load_config("tiny")
    dram = config.dram.model_copy(
        update={"window_bytes": window_bytes, "unit_cache_bytes": unit_cache_bytes}
    )
    device = DeviceDrive.open(
        config.model_copy(update={"dram": dram}),
        folder / "drive.csd",
        clock=VirtualClock(),
        time_mode=TimeMode.VIRTUAL,
        window_path=folder / "window",
    )
    link = InProcessLink(Endpoint(device))
    return Lab(zoo, device, link, Drive(link), folder / "drive.csd" / "nand.img")


@pytest.fixture(scope="session", name="open_lab")
def open_lab_fixture() -> Callable[..., Lab]:
    """For tests with a zoo of their own."""
    return open_lab


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def shared_lab(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = open_lab(zoo, tmp_path_factory.mktemp("lab"), 8 * MIB, MIB)
    yield lab
    lab.drive.close()
    lab.device.close()


@pytest.fixture
def lab(shared_lab: Lab) -> Iterator[Lab]:
    """A drive that tests share, without models in use and without programs."""
    yield shared_lab
    shared_lab.put_back()
    assert shared_lab.leases == 0
    assert shared_lab.drive.release_errors == 0


@pytest.fixture
def make_lab(zoo: Zoo, tmp_path: Path) -> Iterator[MakeLab]:
    """Drives of a test's own: for damage, and for other sizes."""
    made: list[Lab] = []

    def make(window_bytes: int = 4 * MIB, unit_cache_bytes: int = 0, copies: int = 1) -> Lab:
        folder = tmp_path / f"lab-{len(made)}"
        folder.mkdir()
        made.append(open_lab(zoo, folder, window_bytes, unit_cache_bytes))
        made[-1].copies = copies
        return made[-1]

    yield make
    for lab in made:
        while lab.opened:
            lab.opened.pop().csd.close()
        lab.drive.close()
        lab.device.close()


@pytest.fixture
def far_from() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """The largest difference of two tensors, as a share of the second one's largest value."""

    def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found - expected).abs().max() / expected.abs().max())

    return relative


@pytest.fixture
def tokens_of() -> Callable[..., torch.Tensor]:
    """Random token ids int64 [batch, tokens]; the same for the same arguments."""

    def tokens(lab: Lab, name: str, count: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + count)
        vocabulary = lab.zoo.dense(name).config.vocab_size
        return torch.randint(1, vocabulary, (batch, count), generator=generator)

    return tokens


@pytest.fixture
def greedy() -> Callable[..., list[list[int]]]:
    """The new tokens that a model generates, row by row."""

    def generate(model: Any, ids: torch.Tensor, new: int = 6, **settings: Any) -> list[list[int]]:
        mask = settings.pop("attention_mask", torch.ones_like(ids))
        made = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **settings,
        )
        rows: list[list[int]] = made[:, ids.shape[1] :].tolist()
        return rows

    return generate


@pytest.fixture
def process_state() -> Callable[[], tuple[int, int]]:
    """Open file descriptors and threads of this process."""

    def state() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    return state


Choose = Callable[[int, np.ndarray, np.ndarray], np.ndarray]


class MaskedDense:
    """The dense model, of whose FFNs only chosen neurons count in passes of one token.

    choose(layer, asked, scores) -> unit numbers. asked: float32 [1, hidden], the hidden state that
    is known when the layer is requested; scores: float32 [neurons], |silu(gate) * up| * ||down||.
    """

    def __init__(self, dense: LlamaForCausalLM, choose: Choose, lookahead: int) -> None:
        self.model = copy.deepcopy(dense)
        self._choose, self._lookahead = choose, lookahead
        self._entered: dict[int, np.ndarray] = {}
        self._attended: dict[int, np.ndarray] = {}
        for number, layer in enumerate(self.model.model.layers):
            layer.register_forward_pre_hook(_note(self._entered, number), with_kwargs=True)
            layer.post_attention_layernorm.register_forward_pre_hook(
                _note(self._attended, number), with_kwargs=True
            )
            layer.mlp.forward = self._masked(number, layer.mlp)

    def _asked(self, layer: int) -> np.ndarray:
        """Behind the attention `lookahead` layers before; what enters the layer, if too early."""
        if self._lookahead == 0 or layer == 0:
            return self._entered[layer]
        return self._attended[max(0, layer - self._lookahead)]

    def _masked(self, layer: int, mlp: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        norms = mlp.down_proj.weight.norm(dim=0)

        def forward(x: torch.Tensor) -> torch.Tensor:
            inner = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
            if inner.shape[:-1].numel() == 1:
                scores = (inner.abs() * norms).detach().reshape(-1).numpy()
                units = self._choose(layer, self._asked(layer), scores)
                kept = torch.zeros(inner.shape[-1])
                kept[torch.from_numpy(units.astype(np.int64))] = 1
                inner = inner * kept
            result: torch.Tensor = mlp.down_proj(inner)
            return result

        return forward


def _note(states: dict[int, np.ndarray], layer: int) -> Any:
    """A hook that keeps what goes into a module, as [rows, hidden]."""

    def note(_: Any, arguments: Any, keywords: Any) -> None:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        states[layer] = hidden.detach().reshape(-1, hidden.shape[-1]).numpy()

    return note


@pytest.fixture
def masked_dense() -> type[MaskedDense]:
    return MaskedDense
