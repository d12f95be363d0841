"""The plain shadow of any family: FFN units as they lie on the drive, rounded to nearest.

For models that `DenseModel` does not know. What it knows is rounded by `builders`, with a look at
text where that is asked for.
"""

from collections.abc import Callable

from csd_protocol.packed import PackedModel, Site
from csd_protocol.program_file import ShadowLayer, encode_shadow
from host_client.calibrate.builders import Recipe
from host_client.calibrate.low_bit_layers import group_of
from host_client.calibrate.packed_units import norm_parts, site_values
from host_client.driver import Drive
from host_client.model.errors import UnsupportedModel
from host_client.runtime.plain_reads import PlainReads

Progress = Callable[[int, int], None]  # FFNs done, FFNs in all


def build_shadow(drive: Drive, packed: PackedModel, recipe: Recipe, progress: Progress) -> bytes:
    """Gate, up and down rows of every FFN, of every expert in a mixture.

    Raises UnsupportedModel for a recipe with text to fit to.
    """
    if recipe.windows is not None:
        raise UnsupportedModel(
            f"{packed.name}: rounding with a look at text knows LLaMA models only. Leave --fit out"
        )
    reads, ffns = PlainReads(drive, packed), packed.ffns()
    layers: dict[int, ShadowLayer] = {}
    for number, site in enumerate(ffns):
        layers[packed.program_layer(site)] = _shadow_of(reads, packed, site)
        progress(number + 1, len(ffns))
    return encode_shadow(
        packed.name,
        layers,
        bits=recipe.bits,
        group=group_of(ffns[0].cols),
        rms_eps=float(packed.config["rms_norm_eps"]),
    )


def _shadow_of(reads: PlainReads, packed: PackedModel, site: Site) -> ShadowLayer:
    neurons = site_values(reads, packed, site)  # [neurons, 3, hidden]
    return ShadowLayer(
        norm=norm_parts(reads, packed, site.layer)["post_attention_norm"].numpy(),
        gate=neurons[:, 0].numpy(),
        up=neurons[:, 1].numpy(),
        down_norm=neurons[:, 2].norm(dim=1).numpy(),
        down=neurons[:, 2].numpy(),
    )
