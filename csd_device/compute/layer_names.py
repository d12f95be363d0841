"""Layers as program files name them: by the number behind a tensor's name."""

import re
from collections.abc import Mapping
from typing import TypeVar

from csd_device.compute.tensor_file import TensorFile, invalid
from csd_device.errors import CommandError
from csd_protocol.program_file import Tensor
from csd_protocol.status import Status

Layer = TypeVar("Layer")


def numbered_layers(file: TensorFile, name: Tensor) -> list[int]:
    """Numbers, ascending, of the tensors `name.NUMBER`.

    Raises CommandError (Invalid Program Data) when there is none, or one has leading zeroes.
    """
    pattern = re.compile(rf"{name}\.([0-9]{{1,6}})")
    matches = [match for match in map(pattern.fullmatch, file.names()) if match]
    if not matches:
        raise invalid(f"no tensor is named {name} and a layer's number, like {name.of(0)}")
    for match in matches:
        if match[1] != str(int(match[1])):
            raise invalid(f"tensor {match[0]}: layer numbers have no leading zeroes")
    return sorted(int(match[1]) for match in matches)


def known_layer(layers: Mapping[int, Layer], layer: int) -> Layer:
    """Raises CommandError (Invalid Field) naming the layers that there are."""
    found = layers.get(layer)
    if found is None:
        known = f"{min(layers)} to {max(layers)}"
        raise CommandError(
            Status.INVALID_FIELD, f"the program does not score layer {layer}; its layers: {known}"
        )
    return found
