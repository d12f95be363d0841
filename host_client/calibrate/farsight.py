"""The small transformer of a `farsight` program in torch: whole windows of text at a time.

Its weights have the names that the program file gives them, so what was trained is what is written,
and what a file holds is what the lab computes with.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from csd_protocol.program_file import (
    AttentionShape,
    FarsightBlock,
    FarsightBody,
    FarsightHead,
    Key,
    Tensor,
    encode_farsight,
)
from host_client.calibrate.dense_model import rms_norm, rotated
from host_client.calibrate.read_program import ReadProgram


@dataclass(frozen=True, slots=True)
class Farsight:
    """Weights float32, by the tensors' names in the file."""

    shape: AttentionShape
    rms_eps: float
    blocks: int
    layers: tuple[int, ...]  # that it speaks for, ascending
    weights: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, program: ReadProgram) -> "Farsight":
        return cls(
            shape=program.attention(),
            rms_eps=float(program.metadata[Key.RMS_EPS]),
            blocks=len(program.numbers(Tensor.BLOCK_Q)),
            layers=tuple(program.numbers(Tensor.HEAD)),
            weights=program.tensors,
        )

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """[windows, tokens, width] of hidden states [windows, tokens, hidden]."""
        weights, turns = self.weights, self._turns(hidden.shape[1])
        normed = rms_norm(hidden, weights[Tensor.INPUT_NORM], self.rms_eps)
        state = F.linear(normed, weights[Tensor.INPUT])
        for block in range(self.blocks):
            x = rms_norm(state, weights[Tensor.BLOCK_ATTN_NORM.of(block)], self.rms_eps)
            state = state + self._attention(block, x, *turns)
            x = rms_norm(state, weights[Tensor.BLOCK_FFN_NORM.of(block)], self.rms_eps)
            gate = F.silu(F.linear(x, weights[Tensor.BLOCK_GATE.of(block)]))
            activity = gate * F.linear(x, weights[Tensor.BLOCK_UP.of(block)])
            state = state + F.linear(activity, weights[Tensor.BLOCK_DOWN.of(block)])
        return rms_norm(state, weights[Tensor.OUTPUT_NORM], self.rms_eps)

    def scores(self, layer: int, features: torch.Tensor) -> torch.Tensor:
        """[..., units] of one layer."""
        bias = self.weights.get(Tensor.HEAD_BIAS.of(layer))
        return F.linear(features, self.weights[Tensor.HEAD.of(layer)], bias)

    def encode(self, model: str) -> bytes:
        """A program file for the packed model of this name."""
        arrays = {name: values.numpy() for name, values in self.weights.items()}
        blocks = tuple(
            FarsightBlock(
                attn_norm=arrays[Tensor.BLOCK_ATTN_NORM.of(block)],
                q=arrays[Tensor.BLOCK_Q.of(block)],
                k=arrays[Tensor.BLOCK_K.of(block)],
                v=arrays[Tensor.BLOCK_V.of(block)],
                o=arrays[Tensor.BLOCK_O.of(block)],
                ffn_norm=arrays[Tensor.BLOCK_FFN_NORM.of(block)],
                gate=arrays[Tensor.BLOCK_GATE.of(block)],
                up=arrays[Tensor.BLOCK_UP.of(block)],
                down=arrays[Tensor.BLOCK_DOWN.of(block)],
            )
            for block in range(self.blocks)
        )
        body = FarsightBody(
            input_norm=arrays[Tensor.INPUT_NORM],
            input=arrays[Tensor.INPUT],
            blocks=blocks,
            output_norm=arrays[Tensor.OUTPUT_NORM],
        )
        heads = {
            layer: FarsightHead(
                arrays[Tensor.HEAD.of(layer)], arrays.get(Tensor.HEAD_BIAS.of(layer))
            )
            for layer in self.layers
        }
        return encode_farsight(model, body, heads, self.shape, rms_eps=self.rms_eps)

    def _attention(
        self, block: int, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> torch.Tensor:
        """Causal, over the whole window; x [windows, tokens, width], normed."""
        queries, keys, values = (
            F.linear(x, self.weights[name.of(block)])
            .unflatten(2, (-1, self.shape.head_dim))
            .transpose(1, 2)
            for name in (Tensor.BLOCK_Q, Tensor.BLOCK_K, Tensor.BLOCK_V)
        )
        queries, keys = rotated(queries, cosines, sines), rotated(keys, cosines, sines)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=True
        )
        return F.linear(mixed.transpose(1, 2).flatten(2), self.weights[Tensor.BLOCK_O.of(block)])

    def _turns(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the rotary embedding, [tokens, head_dim] each."""
        device = self.weights[Tensor.INPUT].device
        half = self.shape.head_dim // 2
        places = torch.arange(half, dtype=torch.float64, device=device)
        steps = self.shape.rope_theta ** (-places / half)
        angles = torch.arange(tokens, device=device)[:, None] * steps.repeat(2)
        return angles.cos().float(), angles.sin().float()
