"""How long a token should take: a plan's volumes against the rates of a drive and of its host.

Four things work beside each other: NAND fills on-drive DRAM, the drive's processor runs programs
out of that DRAM, the link carries what was staged, and the host reads weights out of its own
memory. In a sweep everything is known in advance, so a layer takes as long as the slowest of them.
In a guided pass a command's parts follow each other, and `lookahead` layers of compute have to
cover them; what they do not cover is waited for.

    sweep    layer = max(nand, compute, dram, link, host)
    guided   layer = max(the same, (latency + compute + nand + link) / max(1, lookahead)),
             and the first layer's units, which nothing hides, once a token

It is a model: rates are peak ones, nothing interferes, and Python costs nothing. What really was
measured stands in docs/BENCHMARKS.md.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import PackedModel, Role, Site
from csd_protocol.units import MIB, NS_PER_S
from host_client.runtime.plan import Plan, head_site
from host_client.runtime.quality import Quality

U32 = npt.NDArray[np.uint32]

LOW_BITS = 4.25  # of a value of a program's rows: 4 bits, and a 16-bit scale for 64 of them
_PROBE_BYTES, _PROBE_ROUNDS = 64 * MIB, 5


@dataclass(frozen=True, slots=True)
class Rates:
    """What a drive can do. Rates in bytes or operations a second."""

    name: str
    nand_bytes_per_s: float
    link_bytes_per_s: float
    dram_bytes_per_s: float
    ops_per_s: float
    unit_cache_bytes: int
    latency_ns: int  # from a command to its first byte: firmware and one sense


# Storage and DRAM bandwidths are the device classes' (docs/DESIGN.md); the rest are the presets'.
CLASSES = (
    Rates("cloud", 56e9, 56e9, 1.2e12, 16e12, 8 << 30, 45_000),
    Rates("edge", 14e9, 14e9, 200e9, 2e12, 1 << 30, 45_000),
    Rates("end", 7e9, 7e9, 10e9, 0.2e12, 256 << 20, 50_000),
)


def rates_of(controller: Mapping[str, Any]) -> Rates:
    """Those of a connected drive, from its Identify Controller."""
    nand, dram, link = controller["nand"], controller["dram"], controller["link"]
    return Rates(
        name=controller["model"],
        nand_bytes_per_s=nand["bytes_per_s"],
        link_bytes_per_s=link["payload_bytes_per_s"],
        dram_bytes_per_s=dram["bytes_per_s"],
        ops_per_s=controller["compute"]["ops_per_s"],
        unit_cache_bytes=dram["unit_cache_bytes"],
        latency_ns=link["firmware_ns"] + nand["read_ns"],
    )


@dataclass(frozen=True, slots=True)
class Volumes:
    """What one step of a decoded token moves and computes; a step is a layer, or the head."""

    staged_bytes: float  # over the link
    host_bytes: float  # weights that the host computes with
    program_bytes: float = 0.0  # of low-bit rows that the drive's programs pass
    program_ops: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenTime:
    """One token, in ns: each part by itself, and the token with all of them side by side."""

    rates: Rates
    nand_ns: float
    compute_ns: float  # the drive's programs: processor or DRAM, whichever takes longer
    dram_ns: float  # units into on-drive DRAM and out again
    link_ns: float
    host_ns: float
    token_ns: float

    @property
    def tokens_per_s(self) -> float:
        return NS_PER_S / self.token_ns

    @property
    def bound(self) -> str:
        """What takes longest by itself; `latency`: none of them, commands wait for each other."""
        parts = {
            "NAND": self.nand_ns,
            "on-drive compute": self.compute_ns,
            "on-drive DRAM": self.dram_ns,
            "link": self.link_ns,
            "host": self.host_ns,
        }
        longest = max(parts, key=lambda name: parts[name])
        return longest if parts[longest] > self.token_ns / 2 else "latency"


def volumes_of(
    model: PackedModel, plan: Plan, quality: Quality, frequencies: U32 | None = None
) -> list[Volumes]:
    """Of each layer, then of the output head.

    frequencies: uint32 [FFNs, neurons]; how much of what a program chooses is resident. Neurons of
    recent tokens count as that many more resident ones: about what they save.
    """
    layers = [
        _layer_volumes(model, plan, quality, frequencies, layer)
        for layer in range(model.layer_count)
    ]
    head = head_site(model)
    missing = (head.count - plan.resident_units[head.site]) * head.unit_bytes
    return [*layers, Volumes(missing, head.length_bytes)]


def _layer_volumes(
    model: PackedModel, plan: Plan, quality: Quality, frequencies: U32 | None, layer: int
) -> Volumes:
    staged = host = 0.0
    for site in model.sites:
        if site.layer != layer or site.role is Role.FFN:
            continue
        staged += (site.count - plan.resident_units[site.site]) * site.unit_bytes
        host += site.length_bytes
    ffns = model.ffns(layer)
    share = int(model.config["num_experts_per_tok"]) / len(ffns) if model.experts else 1.0
    for site in ffns:
        resident = plan.resident_units[site.site] + plan.recent_units
        chosen = site.count * quality.kept * (1.0 - _found(model, site, resident, frequencies))
        away = min(site.count - resident, chosen) if quality.kept < 1.0 else site.count - resident
        staged += share * away * site.unit_bytes
        host += share * (away + resident) * site.unit_bytes
    values = 0.0 if quality.exact else _program_values(model, quality, layer)
    return Volumes(staged, host, values * LOW_BITS / 8, 2 * values)


def _found(model: PackedModel, site: Site, resident: int, frequencies: U32 | None) -> float:
    """The share of a token's wanted neurons that is among the resident ones, the hottest."""
    if frequencies is None:
        return resident / site.count
    counts = np.sort(frequencies[model.program_layer(site)].astype(np.float64))[::-1]
    return float(counts[:resident].sum() / max(1.0, counts.sum()))


def _program_values(model: PackedModel, quality: Quality, layer: int) -> float:
    """Low-bit values that a rollout passes for a layer: the FFN, attention, and the scores.

    A mixture has a shadow in its place: the scores alone, of the experts that were chosen.
    """
    ffn = model.ffns(layer)[0]
    neurons = ffn.count * ffn.values
    if model.experts:
        return 2 / 3 * neurons * int(model.config["num_experts_per_tok"])
    attention = sum(
        site.count * site.values
        for site in model.sites
        if site.layer == layer and site.role in (Role.HEADS, Role.KV)
    )
    return (5 / 3 + quality.corrected) * neurons + attention


def token_time(
    volumes: list[Volumes], rates: Rates, host_bytes_per_s: float, lookahead: int | None
) -> TokenTime:
    """One decoded token. lookahead: of a guided pass; None: a sweep."""
    staged = sum(step.staged_bytes for step in volumes)
    cached = min(1.0, rates.unit_cache_bytes / staged) if staged else 1.0
    parts = np.array([_parts_ns(step, rates, host_bytes_per_s, cached) for step in volumes])
    steps = parts.max(axis=1)
    if lookahead is not None:
        nand, compute, link = parts[:, 0], parts[:, 1], parts[:, 3]
        chain = (rates.latency_ns + nand + compute + link) / max(1, lookahead)
        steps[:-1] = np.maximum(steps, chain)[:-1]  # the head's rows are known in advance
        steps[0] += rates.latency_ns + nand[0] + link[0]
    # Rounded once, so that no part comes out longer than the token.
    nand_ns, compute_ns, dram_ns, link_ns, host_ns = map(math.fsum, parts.T.tolist())
    token_ns = math.fsum(steps.tolist())
    return TokenTime(rates, nand_ns, compute_ns, dram_ns, link_ns, host_ns, token_ns)


def _parts_ns(
    step: Volumes, rates: Rates, host_bytes_per_s: float, cached: float
) -> tuple[float, float, float, float, float]:
    """NAND, compute, DRAM, link, host of one step, each by itself."""
    from_nand = step.staged_bytes * (1.0 - cached)
    compute_s = max(step.program_ops / rates.ops_per_s, step.program_bytes / rates.dram_bytes_per_s)
    return (
        from_nand / rates.nand_bytes_per_s * NS_PER_S,
        compute_s * NS_PER_S,
        (from_nand + step.staged_bytes) / rates.dram_bytes_per_s * NS_PER_S,
        step.staged_bytes / rates.link_bytes_per_s * NS_PER_S,
        (step.host_bytes + step.staged_bytes) / host_bytes_per_s * NS_PER_S,
    )


def measure_host_rate() -> float:
    """Bytes a second that this machine's memory gives one thread, read and written, by copying."""
    source = np.ones(_PROBE_BYTES, np.uint8)
    target = np.empty_like(source)
    np.copyto(target, source)
    best_ns = min(_copy_ns(source, target) for _ in range(_PROBE_ROUNDS))
    return 2 * _PROBE_BYTES * NS_PER_S / best_ns


def _copy_ns(source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8]) -> int:
    started_ns = time.perf_counter_ns()
    np.copyto(target, source)
    return max(1, time.perf_counter_ns() - started_ns)
