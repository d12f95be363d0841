"""Configs of checkpoints that are older than transformers' own class for their architecture.

ChatGLM 2 and 3 and the first Qwen came with model code of their own. Their arithmetic is that of
transformers' `glm` and `qwen2`; so their configs are read as those, and `naming` knows their
tensors. What does not fit is refused, with the option that does not.
"""

from collections.abc import Callable
from typing import Any

from host_client.model.errors import InvalidConfig, UnsupportedModel

_ROPE_THETA = 10000.0


def as_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """The config as a class of transformers takes it; the same where it has one of its own.

    Raises UnsupportedModel, InvalidConfig.
    """
    read = _READERS.get(str(config.get("model_type")))
    if read is None:
        return config
    try:
        return read(config)
    except KeyError as error:
        raise InvalidConfig(f"config: {error.args[0]} is missing") from error


def _chatglm(config: dict[str, Any]) -> dict[str, Any]:
    """ChatGLM 2 and 3, and GLM 4 by its first name."""
    if "num_layers" not in config or "ffn_hidden_size" not in config:
        raise UnsupportedModel(
            "config: this is the first ChatGLM-6B (positions in two dimensions, LayerNorm, GELU), "
            "which no class of transformers computes. Use ChatGLM 2 or 3"
        )
    _require(
        config,
        rmsnorm=True,
        multi_query_attention=True,
        post_layer_norm=True,
        apply_residual_connection_post_layernorm=False,
        add_bias_linear=False,
        original_rope=True,
    )
    if config.get("quantization_bit"):
        raise UnsupportedModel("config: quantization_bit is set. Use the 16-bit checkpoint")
    return {
        "model_type": "glm",
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["ffn_hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["multi_query_group_num"],
        "head_dim": config["kv_channels"],
        "vocab_size": config["padded_vocab_size"],
        "max_position_embeddings": config["seq_length"],
        "rms_norm_eps": config["layernorm_epsilon"],
        "attention_bias": bool(config.get("add_qkv_bias", False)),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": _ROPE_THETA * float(config.get("rope_ratio", 1.0)),
            "partial_rotary_factor": 0.5,
        },
        **_tokens(config),
    }


def _qwen(config: dict[str, Any]) -> dict[str, Any]:
    """The first Qwen. Past `seq_length` its own code changes positions and attention's scale.

    So that is where this one's context ends.
    """
    _require(config, rotary_pct=1.0, no_bias=True, scale_attn_weights=True)
    heads, head_dim = config["num_attention_heads"], config["kv_channels"]
    return {
        "model_type": "qwen2",
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"] // 2,
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["seq_length"],
        "rms_norm_eps": config["layer_norm_epsilon"],
        "rope_theta": config.get("rotary_emb_base", _ROPE_THETA),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        **_tokens(config),
    }


def _require(config: dict[str, Any], **options: Any) -> None:
    """Raises UnsupportedModel for an option with another value; one that is not there has it."""
    for name, value in options.items():
        if config.get(name, value) != value:
            raise UnsupportedModel(
                f"config: {name} is {config[name]!r}; models of the family "
                f"{config['model_type']} are read with {value!r} only"
            )


def _tokens(config: dict[str, Any]) -> dict[str, Any]:
    """None where it does not say: the class's own default is another vocabulary's."""
    return {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


_READERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "chatglm": _chatglm,
    "qwen": _qwen,
}
