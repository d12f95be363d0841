"""One random LLaMA as a sharded 16-bit safetensors folder and as the GGUF of the same values."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

_SPREAD = 0.02  # standard deviation of weights, as models are initialised
_WORDS = 256  # that the tokenizer knows; a prompt is made of them
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a LLaMA, head and embedding apart."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            **asdict(self),
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            dtype="bfloat16",
        )


SHAPES = {
    "tiny": Shape(128, 512, 8, 4, 2, 512),
    "300m": Shape(1024, 4096, 16, 16, 8, 32_000),
    "1b": Shape(2048, 8192, 16, 32, 8, 128_256),  # LLaMA 3.2 1B, its head not tied
}


def make_checkpoint(folder: Path, shape: Shape) -> Path:
    """The folder of safetensors, made unless it is there, a shard a layer."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        places: dict[str, str] = {}
        torch.manual_seed(0)
        count = shape.num_hidden_layers + 2
        for number, tensors in enumerate(_shards(shape), start=1):
            name = f"model-{number:05}-of-{count:05}.safetensors"
            save_file(tensors, folder / name, {"format": "pt"})
            places |= dict.fromkeys(tensors, name)
        index_file = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
        _tokenizer().save_pretrained(folder)
        config = shape.config()
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
    return folder


def make_gguf(folder: Path, shape: Shape, bits: int = 16) -> Path:
    """The same in one file beside the folder, made unless it is there; at 4 bits as Q4_0."""
    path = folder.with_suffix(".gguf") if bits == 16 else folder.with_suffix(".q4_0.gguf")
    if not path.exists():
        fresh = path.with_suffix(".gguf.new")
        writer = gguf.GGUFWriter(fresh, "llama", use_temp_file=False)
        _describe(writer, shape)
        places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        for file in sorted(set(places.values())):
            with safe_open(folder / file, "pt") as tensors:
                for name in sorted(tensors.keys()):
                    _add(writer, name, tensors.get_tensor(name), shape, bits)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        fresh.rename(path)
    return path


def prompt_ids(count: int) -> list[int]:
    return [1 + index % (_WORDS - 1) for index in range(count)]


def prompt_text(ids: list[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


def _shards(shape: Shape) -> Iterator[dict[str, torch.Tensor]]:
    """Embedding, layers, head."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    kv = hidden // heads * shape.num_key_value_heads
    yield {"model.embed_tokens.weight": _random(shape.vocab_size, hidden)}
    for layer in range(shape.num_hidden_layers):
        at = f"model.layers.{layer}"
        yield {
            f"{at}.self_attn.q_proj.weight": _random(hidden, hidden),
            f"{at}.self_attn.k_proj.weight": _random(kv, hidden),
            f"{at}.self_attn.v_proj.weight": _random(kv, hidden),
            f"{at}.self_attn.o_proj.weight": _random(hidden, hidden),
            f"{at}.mlp.gate_proj.weight": _random(shape.intermediate_size, hidden),
            f"{at}.mlp.up_proj.weight": _random(shape.intermediate_size, hidden),
            f"{at}.mlp.down_proj.weight": _random(hidden, shape.intermediate_size),
            f"{at}.input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            f"{at}.post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        }
    yield {
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": _random(shape.vocab_size, hidden),
    }


def _random(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes).mul_(_SPREAD).to(torch.bfloat16)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(_WORDS)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="w0")


def _describe(writer: gguf.GGUFWriter, shape: Shape) -> None:
    config: Any = shape.config()
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(shape.hidden_size // shape.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("llama")
    others = range(256, shape.vocab_size)  # a vocabulary of this kind has every byte
    writer.add_token_list(
        [f"<0x{byte:02X}>" for byte in range(256)] + [f"w{token}" for token in others]
    )
    writer.add_token_scores([0.0] * shape.vocab_size)
    kinds = [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * len(others)
    writer.add_token_types([int(kind) for kind in kinds])


def _add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, shape: Shape, bits: int) -> None:
    heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            tensor = _interleaved(tensor, count)
    if tensor.dim() == 1:
        writer.add_tensor(_gguf_name(name), tensor.float().numpy())
        return
    if bits == 4:
        kind = gguf.GGMLQuantizationType.Q4_0
        levels = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(_gguf_name(name), levels, raw_dtype=kind)
        return
    raw = tensor.contiguous().view(torch.uint8).numpy()
    writer.add_tensor(_gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as GGUF's LLaMA has them: the pairs that rotate together side by side."""
    rows, columns = tensor.shape
    halves = tensor.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _gguf_name(name: str) -> str:
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outer:
        return outer[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def weights_bytes(shape: Shape) -> int:
    """At 16 bits, norms included."""
    with torch.device("meta"):
        return sum(tensor.numel() * 2 for shard in _shards(shape) for tensor in shard.values())
