"""Program files fitted to a packed model: one function a kind, each a closed form.

What needs text walks it once through the model that lies on the drive (`calibration.walk`); nothing
is trained by gradient steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from csd_protocol.packed import PackedModel, Role
from csd_protocol.program_file import (
    AttentionShape,
    RolloutLayer,
    SvdLayer,
    TwoLayers,
    encode_frequency,
    encode_lowrank,
    encode_mlp,
    encode_oracle,
    encode_rollout,
    encode_shadow,
    encode_svd,
    encode_window,
)
from host_client.calibrate.calibration import LayerStatistics, ridge, walk
from host_client.calibrate.choosers import unit_scores
from host_client.calibrate.dense_model import DecoderLayer, DenseModel
from host_client.calibrate.lab import WANTED_SHARE
from host_client.calibrate.low_bit_layers import group_of, round_layer
from host_client.calibrate.packed_checkpoint import PackedCheckpoint
from host_client.calibrate.selection import top
from host_client.driver import Drive
from host_client.model.errors import UnsupportedModel

F32 = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]  # layers done, layers in all

WINDOW_TOKENS, WINDOW_DECAY = 5, 0.8


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a builder may be asked for; each kind takes what concerns it."""

    bits: int = 4
    rank: int = 64
    lookahead: int = 1
    context: int = 2048
    windows: torch.Tensor | None = None  # int64 [windows, tokens] of calibration text
    role: Role = Role.FFN  # whose units are scored; heads: by frequency, lowrank and mlp


class Builder:
    """Builds programs for one packed model."""

    def __init__(
        self, drive: Drive, packed: PackedModel, recipe: Recipe, progress: Progress
    ) -> None:
        self._name, self._recipe, self._progress = packed.name, recipe, progress
        self._model = DenseModel(PackedCheckpoint(drive, packed))

    def shadow(self) -> bytes:
        """Low-bit gate, up and down rows; with text, rounded to fit it."""
        layers = {number: rows.ffn for number, rows in self._rounded()}
        bits, eps = self._recipe.bits, self._model.rms_eps
        return encode_shadow(self._name, layers, bits=bits, group=self._group, rms_eps=eps)

    def rollout(self) -> bytes:
        """The same with attention. Raises UnsupportedModel for positions that are scaled."""
        shape = self._model.shape
        if not self._model.rope_is_plain:
            raise UnsupportedModel(
                f"{self._name} scales its rotary embedding; rollout programs know the plain one. "
                "Build a shadow"
            )
        attention = AttentionShape(
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            rope_theta=self._model.rope_theta,
            context=min(self._recipe.context, self._model.positions_max),
        )
        return encode_rollout(
            self._name,
            dict(self._rounded()),
            attention,
            bits=self._recipe.bits,
            group=self._group,
            rms_eps=self._model.rms_eps,
        )

    def svd(self) -> bytes:
        """Gate and up cut to the recipe's rank: their best approximation of it."""
        layers = {}
        for layer in self._layers():
            gate_outer, gate_inner = _cut(layer.gate, self._recipe.rank)
            up_outer, up_inner = _cut(layer.up, self._recipe.rank)
            layers[layer.number] = SvdLayer(
                norm=layer.norm.numpy(),
                gate_inner=gate_inner,
                gate_outer=gate_outer,
                up_inner=up_inner,
                up_outer=up_outer,
                down_norm=layer.down_norm.numpy(),
            )
        return encode_svd(self._name, layers, rms_eps=self._model.rms_eps)

    def oracle(self) -> bytes:
        norms = {layer.number: layer.down_norm.numpy() for layer in self._layers()}
        return encode_oracle(self._name, norms)

    def head_norms(self) -> bytes:
        """A `frequency` of heads: the mean norm of what each KV group adds, whatever the token."""
        means = {n.layer.number: n.head_norms.mean((0, 1)).numpy() for n in self._walk()}
        return encode_frequency(self._name, means, role=Role.HEADS)

    def lowrank(self) -> bytes:
        """Two linear layers: the ridge regression of the labels, cut to the rank."""
        layers = {}
        for found in self._walk(self._recipe.lookahead):
            norm, x, labels = self._labels(found)
            mean = labels.mean(0)
            outer, inner = _cut(ridge(x, labels - mean).t(), self._recipe.rank)
            layers[found.layer.number] = _two_layers(norm, inner, outer, mean)
        eps, role = self._model.rms_eps, self._recipe.role
        return encode_lowrank(self._name, layers, rms_eps=eps, role=role)

    def mlp(self) -> bytes:
        """ReLU features of random directions, and the ridge regression of the labels."""
        layers = {}
        dice = torch.Generator().manual_seed(0)
        for found in self._walk(self._recipe.lookahead):
            norm, x, labels = self._labels(found)
            mean = labels.mean(0)
            inner = torch.randn(self._recipe.rank, x.shape[1], generator=dice)
            inner /= x.pow(2).sum(1).mean().sqrt()
            outer = ridge((x @ inner.t()).relu(), labels - mean).t()
            layers[found.layer.number] = _two_layers(norm, inner.numpy(), outer, mean)
        eps, role = self._model.rms_eps, self._recipe.role
        return encode_mlp(self._name, layers, rms_eps=eps, role=role)

    def window(self) -> bytes:
        """The units of the last tokens; ties are broken by how often each is wanted at all."""
        assert self._recipe.windows is not None
        tokens = self._recipe.windows.numel()
        shares = {found.layer.number: found.counts / tokens for found in self._walk()}
        return encode_window(self._name, shares, tokens=WINDOW_TOKENS, decay=WINDOW_DECAY)

    @property
    def _group(self) -> int:
        shape = self._model.shape
        return group_of(shape.hidden, shape.heads * shape.head_dim)

    def _layers(self) -> Iterator[DecoderLayer]:
        for number in range(self._model.shape.layers):
            yield self._model.layer(number)
            self._progress(number + 1, self._model.shape.layers)

    def _walk(self, *lookaheads: int) -> Iterator[LayerStatistics]:
        assert self._recipe.windows is not None, "this kind is fitted to text"
        return walk(self._model, self._recipe.windows, lookaheads, self._progress)

    def _rounded(self) -> Iterator[tuple[int, RolloutLayer]]:
        bits, group = self._recipe.bits, self._group
        if self._recipe.windows is None:
            for layer in self._layers():
                yield layer.number, round_layer(layer, bits, group)
        else:
            for found in self._walk():
                yield found.layer.number, round_layer(found.layer, bits, group, found.moments)

    def _labels(self, found: LayerStatistics) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The program's RMSNorm weight, inputs [n, hidden] behind it, and labels [n, units].

        Labels are the wanted units; of KV groups, the norms of what they add.
        """
        if self._recipe.role is Role.HEADS:
            norm, labels = found.layer.attn_norm, found.head_norms.flatten(0, 1)
        else:
            scores = unit_scores(self._model, found.layer, found.attended).flatten(0, 1)
            wanted = top(scores, max(1, round(WANTED_SHARE * scores.shape[1])))
            norm, labels = found.layer.norm, wanted.float()
        x = self._model.normed(found.seen[self._recipe.lookahead], norm)
        return norm, x.flatten(0, 1), labels


def _two_layers(
    norm: torch.Tensor, inner: F32, outer: torch.Tensor | F32, bias: torch.Tensor
) -> TwoLayers:
    return TwoLayers(
        norm=norm.numpy(), inner=inner, outer=np.asarray(outer), outer_bias=bias.numpy()
    )


def _cut(matrix: torch.Tensor, rank: int) -> tuple[F32, F32]:
    """Two thin matrices, [rows, rank] and [rank, columns], whose product is closest to `matrix`."""
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = min(rank, sizes.numel())
    roots = sizes[:rank].sqrt()
    return (left[:, :rank] * roots).numpy(), (roots[:, None] * right[:rank]).numpy()
