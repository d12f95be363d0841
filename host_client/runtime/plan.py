"""The memory plan: given a budget, what is resident, what is staged, what streams.

The budget covers everything of the model that lies in host memory: resident units, staging buffers,
the KV cache at its full context, the table of checksums and a small buffer for units fetched by
name. What remains for weights is given out in the order of what a token needs surely: key and value
projections, heads, the output head's rows, and last FFN neurons, hottest first, the same number in
each layer so that no layer waits longer than another. Staging buffers are small: a layer's neurons
pass through them part by part. A part of the neurons' memory may be for those of the last tokens
instead (`recent`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import PackedModel, Role, Site, align_up
from csd_protocol.units import format_size, parse_size
from host_client.runtime.recent_room import WORTH_BYTES, RecentRoom, slot_bytes
from host_client.runtime.refusals import BudgetTooSmall, InvalidBudget

U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

ALWAYS_RESIDENT = (Role.NORMS, Role.FINAL_NORM, Role.ROUTER)
BUFFERS = 2  # one part is read while another computes
PART_BYTES = 24 << 20  # of a layer's neurons, read at once: long reads, and little memory
KV_VALUE_BYTES = 4  # float32, as the attention computes
FETCH_ROWS, FETCH_NEURONS = 64, 128  # what one fetch outside the steps brings at most
HEAD_SLICE_BYTES_MIN = 1 << 20
STAGE_ALIGN_BYTES = 64  # of each site's part of a staging buffer


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run holds in host memory. Sizes in bytes, counts in units."""

    budget_bytes: int
    context: int  # tokens that the KV cache may grow to
    kv_bytes: int
    table_bytes: int  # checksums and unit indexes
    fetch_buffer_bytes: int
    buffer_bytes: int  # of each of BUFFERS staging buffers
    expert_buffer_bytes: int = 0  # the same for a mixture's experts
    resident_units: dict[int, int] = field(default_factory=dict)  # site -> units kept
    resident_bytes: int = 0
    recent_units: int = 0  # of each layer, for neurons of the last tokens
    recent_bytes: int = 0  # of all layers, with the tables for them
    staged_bytes_per_token: int = 0  # exact quality
    weights_bytes: int = 0  # the whole model at 16 bits

    @property
    def staging_bytes(self) -> int:
        return BUFFERS * (self.buffer_bytes + self.expert_buffer_bytes)

    @property
    def total_bytes(self) -> int:
        return (
            self.resident_bytes
            + self.recent_bytes
            + self.staging_bytes
            + self.fetch_buffer_bytes
            + self.table_bytes
            + self.kv_bytes
        )

    @property
    def needs_drive(self) -> bool:
        """Whether anything is staged, so that a drive is worth having."""
        return self.staged_bytes_per_token > 0

    def fits(self, weights_bytes: int) -> bool:
        """Whether so many bytes of weights would all be resident within the budget."""
        rest_bytes = self.kv_bytes + self.table_bytes + self.fetch_buffer_bytes
        return weights_bytes + rest_bytes <= self.budget_bytes

    def keeps_all(self, site: Site) -> bool:
        return self.resident_units[site.site] == site.count


def parse_budget(text: str | int, model: PackedModel) -> int:
    """Bytes from a size (`5GiB`) or from a share of the model's 16-bit weights (`45%`).

    Raises InvalidBudget.
    """
    try:
        if isinstance(text, str) and text.strip().endswith("%"):
            size_bytes = int(model.weights_bytes_16bit * float(text.strip()[:-1]) / 100)
        else:
            size_bytes = parse_size(text)
    except (ValueError, OverflowError):
        size_bytes = -1
    if size_bytes < 0:
        raise InvalidBudget(
            f"{text!r} is neither a size like 5GiB nor a share of the weights like 45%"
        )
    return size_bytes


def kv_bytes_per_token(model: PackedModel) -> int:
    """Keys and values of one position in all layers, float32."""
    kv = model.find(Role.KV, 0)
    return model.layer_count * kv.rows * KV_VALUE_BYTES


def head_site(model: PackedModel) -> Site:
    """The rows that the output head multiplies with: its own, or the embedding's when tied."""
    try:
        return model.find(Role.LM_HEAD)
    except KeyError:
        return model.find(Role.EMBED)


def is_divisible(site: Site) -> bool:
    """Whether a site's units can be used part by part; of others all are needed at once."""
    return site.role is Role.FFN


class _Draft:
    """A plan in the making: residency so far, and what it adds up to."""

    def __init__(self, model: PackedModel, context: int, frequencies: U32 | None) -> None:
        self.model = model
        self.ffns = [model.ffns(layer) for layer in range(model.layer_count)]
        self._hottest = [_by_heat(model, sites, frequencies) for sites in self.ffns]
        self._experts_of_token = int(model.config["num_experts_per_tok"]) if model.experts else 0
        self.head = head_site(model)
        self.sites_of_layer = [
            [site for site in model.sites if site.layer == layer and site.expert < 0]
            for layer in range(model.layer_count)
        ]
        self.resident = {site.site: 0 for site in model.sites}
        for site in model.sites:
            if site.role in ALWAYS_RESIDENT:
                self.resident[site.site] = site.count
        self.recent_units = 0
        self.kv_bytes = context * kv_bytes_per_token(model)
        neurons = sum(site.count for site in model.sites if site.role is Role.FFN)
        self.table_bytes = 4 * (model.unit_count + neurons)
        self.fetch_buffer_bytes = max(
            FETCH_ROWS * model.find(Role.EMBED).unit_bytes,
            FETCH_NEURONS * self.ffns[0][0].unit_bytes,
        )

    def missing_bytes(self, site: Site) -> int:
        return (site.count - self.resident[site.site]) * site.unit_bytes

    def layer_bytes(self, layer: int) -> int:
        """What is staged of this layer, each site aligned."""
        return self._aligned_bytes(self.sites_of_layer[layer])

    def whole_bytes(self, layer: int) -> int:
        """The same of what a buffer has to hold at once: projections."""
        return self._aligned_bytes(
            [site for site in self.sites_of_layer[layer] if not is_divisible(site)]
        )

    def expert_buffer_bytes(self) -> int:
        """Room for a part of an expert; or for all that one token may lack, where that is less."""
        if not self.model.experts:
            return 0
        largest = max(self.missing_bytes(site) for sites in self.ffns for site in sites)
        return min(self._part_bytes, align_up(largest, STAGE_ALIGN_BYTES) * self._experts_of_token)

    @property
    def _part_bytes(self) -> int:
        return max(PART_BYTES, self.ffns[0][0].unit_bytes)

    def _aligned_bytes(self, sites: Sequence[Site]) -> int:
        sizes = (self.missing_bytes(site) for site in sites)
        return sum(align_up(size, STAGE_ALIGN_BYTES) for size in sizes)

    def staging_bytes(self) -> int:
        return BUFFERS * (self.buffer_bytes() + self.expert_buffer_bytes())

    def buffer_bytes(self) -> int:
        layers = range(self.model.layer_count)
        return max(
            max(map(self.whole_bytes, layers)),
            min(self._part_bytes, max(map(self.layer_bytes, layers))),
            min(HEAD_SLICE_BYTES_MIN, self.missing_bytes(self.head)),
        )

    def resident_bytes(self) -> int:
        return sum(self.resident[site.site] * site.unit_bytes for site in self.model.sites)

    def recent_bytes(self) -> int:
        if not self.recent_units:
            return 0
        site = self.ffns[0][0]
        layer_bytes = self.recent_units * slot_bytes(site) + site.count * WORTH_BYTES
        return self.model.layer_count * layer_bytes

    def staged_bytes(self) -> int:
        layers = sum(self.missing_bytes(site) for sites in self.sites_of_layer for site in sites)
        return layers + self.missing_bytes(self.head) + self.expert_bytes()

    def expert_bytes(self) -> int:
        """What the experts of one token lack, if it were to choose any as likely as another."""
        if not self.model.experts:
            return 0
        missing = sum(self.missing_bytes(site) for sites in self.ffns for site in sites)
        return missing * self._experts_of_token // self.model.experts

    def total_bytes(self) -> int:
        return (
            self.resident_bytes()
            + self.recent_bytes()
            + self.staging_bytes()
            + self.fetch_buffer_bytes
            + self.table_bytes
            + self.kv_bytes
        )

    def grow(self, keep: Callable[[int], None], most: int, budget_bytes: int) -> None:
        """`keep` the greatest number up to `most` that the budget allows.

        All of them is tried first: then a part of the buffers falls away, and the sum with it.
        """
        keep(most)
        if self.total_bytes() <= budget_bytes:
            return
        low, high = 0, most - 1
        while low < high:
            middle = (low + high + 1) // 2
            keep(middle)
            if self.total_bytes() <= budget_bytes:
                low = middle
            else:
                high = middle - 1
        keep(low)

    def keep_layers_of(self, role: Role) -> Callable[[int], None]:
        def keep(layers: int) -> None:
            for layer in range(self.model.layer_count):
                site = self.model.find(role, layer)
                self.resident[site.site] = site.count if layer < layers else 0

        return keep

    def keep_hottest(self, count: int) -> None:
        """So many neurons of each layer, of whichever experts."""
        for sites, owners in zip(self.ffns, self._hottest, strict=True):
            kept = np.bincount(owners[:count], minlength=len(sites))
            for site, units in zip(sites, kept.tolist(), strict=True):
                self.resident[site.site] = units

    def keep_recent(self, count: int) -> None:
        """So many of each layer's neurons of the last tokens."""
        self.recent_units = count

    def share_with_recent(self, room: RecentRoom, budget_bytes: int) -> None:
        """Gives a part of what neurons have to those of the last tokens, at most all of it."""
        site = self.ffns[0][0]
        neurons = self.resident[site.site]
        wanted = room.slots(neurons, self.model.layer_count * slot_bytes(site))
        if not wanted or neurons == site.count:
            return
        self.keep_hottest(0)
        self.grow(self.keep_recent, min(wanted, site.count), budget_bytes)
        self.grow(self.keep_hottest, site.count - self.recent_units, budget_bytes)

    def keep_units(self, sites: list[Site]) -> Callable[[int], None]:
        def keep(count: int) -> None:
            for site in sites:
                self.resident[site.site] = min(count, site.count)

        return keep


def _by_heat(model: PackedModel, ffns: tuple[Site, ...], frequencies: U32 | None) -> I64:
    """Whose neuron each is of a layer's, the hottest first: the index in `ffns` of each.

    Where nothing was counted, all FFNs of the layer take turns.
    """
    owners = np.repeat(np.arange(len(ffns)), ffns[0].count)
    if frequencies is None:
        return owners.reshape(len(ffns), -1).T.reshape(-1)
    counts = np.concatenate([frequencies[model.program_layer(site)] for site in ffns])
    hottest: I64 = owners[np.argsort(-counts.astype(np.int64), kind="stable")]
    return hottest


def make_plan(
    model: PackedModel,
    budget_bytes: int,
    context: int,
    frequencies: U32 | None = None,
    recent: RecentRoom | None = None,
) -> Plan:
    """The plan that stages least within `budget_bytes`. Raises BudgetTooSmall.

    frequencies: how often each neuron was wanted [FFNs, neurons]; they divide a layer's resident
    neurons among a mixture's experts. recent: what of the neurons' memory is for those of the last
    tokens; not for a mixture.
    """
    draft = _Draft(model, context, frequencies)
    if draft.total_bytes() > budget_bytes:
        raise BudgetTooSmall(
            budget_bytes,
            draft.total_bytes(),
            f"the KV cache of {context} tokens ({format_size(draft.kv_bytes)}), staging "
            f"buffers ({format_size(draft.staging_bytes())}) and norms and tables",
        )
    layers = model.layer_count
    neurons = max(sum(site.count for site in sites) for sites in draft.ffns)
    draft.grow(draft.keep_layers_of(Role.KV), layers, budget_bytes)
    draft.grow(draft.keep_layers_of(Role.HEADS), layers, budget_bytes)
    draft.grow(draft.keep_units([draft.head]), draft.head.count, budget_bytes)
    draft.grow(draft.keep_hottest, neurons, budget_bytes)
    if recent is not None and not model.experts:
        draft.share_with_recent(recent, budget_bytes)
    embed = model.find(Role.EMBED)
    if embed is not draft.head:
        draft.grow(draft.keep_units([embed]), embed.count, budget_bytes)
    return Plan(
        budget_bytes=budget_bytes,
        context=context,
        kv_bytes=draft.kv_bytes,
        table_bytes=draft.table_bytes,
        fetch_buffer_bytes=draft.fetch_buffer_bytes,
        buffer_bytes=draft.buffer_bytes(),
        expert_buffer_bytes=draft.expert_buffer_bytes(),
        recent_units=draft.recent_units,
        recent_bytes=draft.recent_bytes(),
        resident_units=draft.resident,
        resident_bytes=draft.resident_bytes(),
        staged_bytes_per_token=draft.staged_bytes(),
        weights_bytes=model.weights_bytes_16bit,
    )
