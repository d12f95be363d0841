"""The `gate` program of a mixture: its own routers, at 16 bits, each behind its layer's norm."""

from collections.abc import Callable

import torch

from csd_protocol.packed import PackedModel, Role
from csd_protocol.program_file import GateLayer, encode_gate
from host_client.calibrate.packed_units import norm_parts, site_values
from host_client.driver import Drive
from host_client.model.errors import UnsupportedModel
from host_client.runtime.plain_reads import PlainReads

Progress = Callable[[int, int], None]  # layers done, layers in all


def build_gate(drive: Drive, packed: PackedModel, progress: Progress) -> bytes:
    """A program file; nothing is trained or rounded.

    Raises UnsupportedModel for a model without experts, or routers that float16 cannot hold.
    """
    if not packed.experts:
        raise UnsupportedModel(
            f"{packed.name} is no mixture of experts: it has no routers for a gate to ask. "
            "Build a shadow or a rollout"
        )
    reads = PlainReads(drive, packed)
    layers: dict[int, GateLayer] = {}
    for layer in range(packed.layer_count):
        router = site_values(reads, packed, packed.find(Role.ROUTER, layer))[:, 0].half()
        if not torch.isfinite(router).all():
            raise UnsupportedModel(
                f"{packed.name}: the router of layer {layer} has values beyond what float16, the "
                "type of a program's matrices, can hold"
            )
        norm = norm_parts(reads, packed, layer)["post_attention_norm"]
        layers[layer] = GateLayer(norm=norm.numpy(), router=router.numpy())
        progress(layer + 1, packed.layer_count)
    return encode_gate(packed.name, layers, rms_eps=float(packed.config["rms_norm_eps"]))
