"""Program files fitted to a model: one function a kind.

What needs text walks it once through the model, layer by layer. `lowrank`, `mlp` and `farsight` are
trained by gradient from a closed form on; the others are closed forms.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from csd_protocol.packed import Role
from csd_protocol.program_file import (
    AttentionShape,
    ProgramKind,
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
from host_client.calibrate import farsight_fit, two_layers
from host_client.calibrate.calibration import LayerStatistics, walk
from host_client.calibrate.dense_model import DecoderLayer, DenseModel
from host_client.calibrate.farsight_fit import SightText, fit_farsight, width_for
from host_client.calibrate.labels import Labels, LayerLabels, SoftLabels, label_layers
from host_client.calibrate.low_bit_layers import group_of, round_layer
from host_client.calibrate.two_layers import Rows, fit_two_layers
from host_client.model.errors import UnsupportedModel

F32 = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]  # layers done, layers in all

WINDOW_TOKENS, WINDOW_DECAY = 5, 0.8

# A layer's number, states [windows, tokens, hidden], the program's RMSNorm weight, and labels.
_Examples = tuple[int, torch.Tensor, torch.Tensor, Labels | SoftLabels]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a builder may be asked for; each kind takes what concerns it."""

    bits: int = 4
    rank: int = 64
    lookahead: int = 1
    context: int = 2048
    size: float | None = None  # of a farsight: its share of the model's parameters
    epochs: int | None = None  # of gradient training; None: as many as the kind needs
    windows: torch.Tensor | None = None  # int64 [windows, tokens] of calibration text
    role: Role = Role.FFN  # whose units are scored; heads: by frequency, lowrank and mlp


class Builder:
    """Builds programs for one model. `name`: of the packed model that will run them."""

    def __init__(self, name: str, model: DenseModel, recipe: Recipe, progress: Progress) -> None:
        self._name, self._model = name, model
        self._recipe, self._progress = recipe, progress

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
        """Two linear layers, each layer's states to what it wants."""
        layers = self._two_layers(ProgramKind.LOWRANK)
        eps, role = self._model.rms_eps, self._recipe.role
        return encode_lowrank(self._name, layers, rms_eps=eps, role=role)

    def mlp(self) -> bytes:
        """The same with a ReLU between them."""
        layers = self._two_layers(ProgramKind.MLP)
        eps, role = self._model.rms_eps, self._recipe.role
        return encode_mlp(self._name, layers, rms_eps=eps, role=role)

    def farsight(self) -> bytes:
        """A small transformer over embeddings.

        Raises RequestRefused for a share of the model's parameters, or a text, that is too small.
        """
        assert self._recipe.windows is not None, "this kind is fitted to text"
        shape = self._model.shape
        outputs = shape.layers * shape.ffn
        width = width_for(self._model.parameters, self._recipe.size, shape.hidden, outputs)
        wanted = [found.wanted for found in self._labelled()]
        text = SightText(self._model.embed(self._recipe.windows), wanted)
        epochs = self._epochs(farsight_fit.EPOCHS_DEFAULT)
        sight = fit_farsight(text, width, self._model.rms_eps, epochs, self._progress)
        return sight.encode(self._name)

    def window(self) -> bytes:
        """The units of the last tokens; ties are broken by how often each is wanted at all."""
        shares = {found.layer.number: found.wanted.shares() for found in self._labelled()}
        return encode_window(self._name, shares, tokens=WINDOW_TOKENS, decay=WINDOW_DECAY)

    @property
    def _group(self) -> int:
        shape = self._model.shape
        return group_of(shape.hidden, shape.heads * shape.head_dim)

    def _layers(self) -> Iterator[DecoderLayer]:
        for number in range(self._model.shape.layers):
            yield self._model.layer(number)
            self._progress(number + 1, self._model.shape.layers)

    def _labelled(self, *lookaheads: int) -> Iterator[LayerLabels]:
        assert self._recipe.windows is not None, "this kind is fitted to text"
        return label_layers(self._model, self._recipe.windows, lookaheads, self._progress)

    def _walk(self, *lookaheads: int) -> Iterator[LayerStatistics]:
        assert self._recipe.windows is not None, "this kind is fitted to text"
        return walk(self._model, self._recipe.windows, lookaheads, self._progress)

    def _two_layers(self, kind: ProgramKind) -> dict[int, TwoLayers]:
        recipe = self._recipe
        epochs = self._epochs(two_layers.EPOCHS_DEFAULT)
        layers = {}
        for number, state, norm, wanted in self._examples(recipe.lookahead):
            rows = Rows(self._model.normed(state, norm).flatten(0, 1), wanted)
            layers[number] = fit_two_layers(kind, rows, norm, recipe.rank, epochs)
        return layers

    def _examples(self, lookahead: int) -> Iterator[_Examples]:
        if self._recipe.role is Role.HEADS:
            for passed in self._walk(lookahead):
                soft, layer = SoftLabels.of(passed.head_norms), passed.layer
                yield layer.number, passed.seen[lookahead], layer.attn_norm, soft
        else:
            for found in self._labelled(lookahead):
                layer = found.layer
                yield layer.number, found.seen[lookahead], layer.norm, found.wanted

    def _epochs(self, default: int) -> int:
        return default if self._recipe.epochs is None else self._recipe.epochs

    def _rounded(self) -> Iterator[tuple[int, RolloutLayer]]:
        bits, group = self._recipe.bits, self._group
        if self._recipe.windows is None:
            for layer in self._layers():
                yield layer.number, round_layer(layer, bits, group)
        else:
            for found in self._walk():
                yield found.layer.number, round_layer(found.layer, bits, group, found.moments)


def _cut(matrix: torch.Tensor, rank: int) -> tuple[F32, F32]:
    """Two thin matrices, [rows, rank] and [rank, columns], whose product is closest to `matrix`."""
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = min(rank, sizes.numel())
    roots = sizes[:rank].sqrt()
    return (left[:, :rank] * roots).numpy(), (roots[:, None] * right[:rank]).numpy()
