"""Choosers of program files: `lowrank`, `mlp`, `svd` and `farsight` in torch, on whole windows.

A drive scores one row at a time; here whole windows are scored at once, from the same numbers.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from csd_protocol.program_file import Key, ProgramKind, Tensor
from host_client.calibrate.choosers import Chooser, Known, LayerViews
from host_client.calibrate.dense_model import rms_norm
from host_client.calibrate.farsight import Farsight
from host_client.calibrate.read_program import ReadProgram, read_program


def chooser_of(data: bytes, lookahead: int) -> Callable[[], Chooser]:
    """Makes choosers of a program file; `lookahead` as in `choosers`.

    A farsight looks once a token, at the embedding, whatever the lookahead.
    """
    program = read_program(data)
    kind = program.kind
    if kind is ProgramKind.FARSIGHT:
        sight = Farsight.of(program)
        return lambda: FarsightChooser(sight)
    score = _svd if kind is ProgramKind.SVD else _two_layers
    return lambda: StateChooser(program, score, lookahead)


class StateChooser:
    """A program that scores a layer on the state that is there in time, and on nothing else."""

    def __init__(
        self,
        program: ReadProgram,
        score: Callable[[ReadProgram, int, torch.Tensor], torch.Tensor],
        lookahead: int,
    ) -> None:
        self._program, self._score = program, score
        self._known = Known(lookahead)

    def entered(self, views: LayerViews, hidden: torch.Tensor) -> None:
        self._known.entered(views.dense.number, hidden)

    def scores(
        self, views: LayerViews, attended: torch.Tensor, activity: torch.Tensor
    ) -> torch.Tensor:
        layer = views.dense.number
        seen = self._known.seen(layer, attended)
        norm = self._program.tensors[Tensor.NORM.of(layer)]
        x = rms_norm(seen, norm, float(self._program.metadata[Key.RMS_EPS]))
        return self._score(self._program, layer, x)


class FarsightChooser:
    """A small transformer that looks once a token and speaks for all layers."""

    def __init__(self, sight: Farsight) -> None:
        self._sight = sight
        self._features = torch.empty(0)

    def entered(self, views: LayerViews, hidden: torch.Tensor) -> None:
        if views.dense.number == 0:
            self._features = self._sight.features(hidden)

    def scores(
        self, views: LayerViews, attended: torch.Tensor, activity: torch.Tensor
    ) -> torch.Tensor:
        return self._sight.scores(views.dense.number, self._features)


def _two_layers(program: ReadProgram, layer: int, x: torch.Tensor) -> torch.Tensor:
    tensors = program.tensors
    inner = F.linear(x, tensors[Tensor.INNER.of(layer)], tensors.get(Tensor.INNER_BIAS.of(layer)))
    between = inner.relu() if program.kind is ProgramKind.MLP else inner
    outer, bias = tensors[Tensor.OUTER.of(layer)], tensors.get(Tensor.OUTER_BIAS.of(layer))
    return F.linear(between, outer, bias)


def _svd(program: ReadProgram, layer: int, x: torch.Tensor) -> torch.Tensor:
    tensors = program.tensors
    gate, up = (
        F.linear(F.linear(x, tensors[inner.of(layer)]), tensors[outer.of(layer)])
        for inner, outer in (
            (Tensor.GATE_INNER, Tensor.GATE_OUTER),
            (Tensor.UP_INNER, Tensor.UP_OUTER),
        )
    )
    scores: torch.Tensor = (F.silu(gate) * up).abs() * tensors[Tensor.DOWN_NORM.of(layer)]
    return scores
