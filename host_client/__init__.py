"""The host: driver, packer and runtime for transformers models whose weights lie on a drive."""

from typing import Any

__all__ = ["CsdModelForCausalLM", "Drive"]


def __getattr__(name: str) -> Any:
    """The public names, imported on first use: torch and transformers take seconds."""
    if name == "CsdModelForCausalLM":
        from host_client.runtime.causal_lm import CsdModelForCausalLM

        return CsdModelForCausalLM
    if name == "Drive":
        from host_client.driver import Drive

        return Drive
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
