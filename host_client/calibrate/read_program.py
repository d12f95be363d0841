"""A program file read back on the host: the lab scores with the numbers that a drive has."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load

from csd_protocol.program_file import AttentionShape, Key, ProgramKind, Tensor

_LENGTH_BYTES = 8  # of a safetensors header's length, little endian


@dataclass(frozen=True, slots=True)
class ReadProgram:
    """What a program file says; its tensors as float32, low-bit rows as they are."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor]

    @property
    def kind(self) -> ProgramKind:
        return ProgramKind(self.metadata[Key.KIND])

    def numbers(self, name: Tensor) -> list[int]:
        """Layers, or blocks, that have a tensor of this name, ascending."""
        prefix = f"{name.value}."
        return sorted(
            int(found.removeprefix(prefix)) for found in self.tensors if found.startswith(prefix)
        )

    def attention(self) -> AttentionShape:
        """Of a kind that has attention."""
        said = self.metadata
        return AttentionShape(
            heads=int(said[Key.HEADS]),
            kv_heads=int(said[Key.KV_HEADS]),
            head_dim=int(said[Key.HEAD_DIM]),
            rope_theta=float(said[Key.ROPE_THETA]),
            context=int(said[Key.CONTEXT]),
        )


def read_program(data: bytes) -> ReadProgram:
    """The content of a file that this host wrote itself: nothing is checked."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    header = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
    tensors = {
        name: values.float() if values.is_floating_point() else values
        for name, values in load(data).items()
    }
    return ReadProgram(header["__metadata__"], tensors)
