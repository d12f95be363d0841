"""Tables and JSON objects of what a plan keeps and what a run did."""

from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from csd_protocol.packed import PackedModel, Role
from csd_protocol.units import NS_PER_MS, format_ns, format_size
from host_client.model.unit_bits import fewer_bits, weights_bytes_at
from host_client.runtime.plan import Plan, head_site
from host_client.runtime.quality import Quality
from host_client.runtime.token_time import TokenTime

if TYPE_CHECKING:
    from host_client.runtime.generate import GenerationReport
    from host_client.runtime.memory_limit import EnforcedReport
    from host_client.runtime.plain_reads import Damage


def plan_object(packed: PackedModel, plan: Plan) -> dict[str, Any]:
    """A plan with stable keys; sizes in bytes."""
    return {
        "model": packed.name,
        "dram_budget_bytes": plan.budget_bytes,
        "weights_bytes_16bit": plan.weights_bytes,
        "weights_bytes": packed.weights_bytes,
        "total_bytes": plan.total_bytes,
        "resident_bytes": plan.resident_bytes,
        "recent_bytes": plan.recent_bytes,
        "staging_buffer_bytes": plan.staging_bytes,
        "fetch_buffer_bytes": plan.fetch_buffer_bytes,
        "kv_cache_bytes": plan.kv_bytes,
        "table_bytes": plan.table_bytes,
        "context": plan.context,
        "staged_bytes_per_token": plan.staged_bytes_per_token,
        "needs_drive": plan.needs_drive,
        "verdict": plan_verdict(packed, plan),
        "resident": {
            role.value: {"units": kept, "of": count}
            for role, (kept, count) in _by_role(packed, plan).items()
        },
    }


def plan_verdict(packed: PackedModel, plan: Plan) -> str | None:
    """When a drive is not worth it: all fits as it is, or would at fewer bits. None: it is."""
    if not plan.needs_drive:
        return (
            "All of it fits the budget: nothing is staged, and the drive only loads it. It pays "
            "for a model that does not fit."
        )
    for bits in fewer_bits(packed):
        size_bytes = weights_bytes_at(packed, bits)
        if plan.fits(size_bytes):
            loss = ", without loss" if bits == 12 else ""
            return (
                f"At {bits} bits ({format_size(size_bytes)}, pack --bits {bits}{loss}) all of it "
                f"would fit the budget, and need no drive."
            )
    return None


def plan_table(packed: PackedModel, plan: Plan) -> Table:
    table = Table(
        "part",
        "resident",
        "of",
        "",
        title=f"{packed.name} within {format_size(plan.budget_bytes)}",
        title_justify="left",
    )
    for role, (kept, count) in _by_role(packed, plan).items():
        table.add_row(_describe(packed, role), f"{kept:,}", f"{count:,}", _bar(kept / count))
    table.add_section()
    for name, size in (
        ("resident weights", plan.resident_bytes),
        ("neurons of the last tokens", plan.recent_bytes),
        ("staging buffers", plan.staging_bytes),
        ("fetch buffer and tables", plan.fetch_buffer_bytes + plan.table_bytes),
        (f"KV cache, {plan.context} tokens", plan.kv_bytes),
        ("in all", plan.total_bytes),
        ("all weights on the drive", packed.weights_bytes),
        ("all weights at 16 bits", plan.weights_bytes),
        ("staged a token (exact)", plan.staged_bytes_per_token),
    ):
        table.add_row(name, format_size(size), "", _bar(size / plan.weights_bytes))
    return table


def times_object(
    times: list[TokenTime], quality: Quality, host_bytes_per_s: float
) -> dict[str, Any]:
    """Modelled tokens of a plan on several drives, with stable keys; the connected drive last."""
    return {
        "quality": str(quality),
        "host_bytes_per_s": host_bytes_per_s,
        "modelled": [
            {
                "drive": time.rates.name,
                "storage_bytes_per_s": time.rates.link_bytes_per_s,
                "nand_ns": time.nand_ns,
                "compute_ns": time.compute_ns,
                "dram_ns": time.dram_ns,
                "link_ns": time.link_ns,
                "host_ns": time.host_ns,
                "token_ns": time.token_ns,
                "tokens_per_s": time.tokens_per_s,
                "bound": time.bound,
            }
            for time in times
        ],
    }


def times_table(times: list[TokenTime], quality: Quality, host_bytes_per_s: float) -> Table:
    table = Table(
        *("drive", "GB/s", "NAND", "programs", "DRAM", "link", "host", "a token", "tokens/s"),
        "bound by",
        title=f"a decoded token at quality {quality}, modelled, in ms\n"
        f"(each part by itself, then all side by side; the host at "
        f"{host_bytes_per_s / 1e9:.1f} GB/s)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    for time in times:
        parts = (time.nand_ns, time.compute_ns, time.dram_ns, time.link_ns, time.host_ns)
        table.add_row(
            time.rates.name,
            f"{time.rates.link_bytes_per_s / 1e9:.0f}",
            *(f"{part_ns / NS_PER_MS:.2f}" for part_ns in (*parts, time.token_ns)),
            f"{time.tokens_per_s:.2f}",
            time.bound,
        )
    return table


def verify_object(packed: PackedModel, damage: "list[Damage]") -> dict[str, Any]:
    """What `csd verify` found, with stable keys. `lost`: units that no copy has."""
    lost: list[dict[str, Any]] = []
    for site in {part.site.site: part.site for part in damage}.values():
        held = [set(part.units.tolist()) for part in damage if part.site.site == site.site]
        gone = set.intersection(*held) if len(held) == packed.copies else set()
        if gone:
            lost.append({"site": site.name, "layer": site.layer, "units": sorted(gone)})
    return {
        "model": packed.name,
        "copies": packed.copies,
        "units": packed.unit_count * packed.copies,
        "damaged_units": sum(int(part.units.size) for part in damage),
        "damaged": [
            {
                "site": part.site.name,
                "layer": part.site.layer,
                "copy": part.copy,
                "units": part.units.tolist(),
            }
            for part in damage
        ],
        "lost": lost,
    }


def verify_text(report: dict[str, Any]) -> str:
    """The same for people."""
    name, units = report["model"], f"{report['units']:,} units"
    copies = f"{report['copies']} cop{'y' if report['copies'] == 1 else 'ies'}"
    if not report["damaged"]:
        return f"{name}: {units} in {copies} are as they were packed"
    lines = [f"{name}: of {units} in {copies}, {report['damaged_units']:,} are damaged:"]
    lines += [
        f"  {part['site']}, copy {part['copy']}: {', '.join(map(str, part['units']))}"
        for part in report["damaged"]
    ]
    if report["lost"]:
        gone = sum(len(part["units"]) for part in report["lost"])
        lines.append(f"lost in every copy: {gone:,} units. Pack the model again with --replace")
    else:
        lines.append("another copy has each of them: generation goes on, and reads them there")
    return "\n".join(lines)


def generation_table(report: "GenerationReport", plan: Plan) -> Table:
    share = report.host_weights_peak_bytes / report.weights_bytes_16bit
    drive = report.drive
    table = Table(show_header=False, title="what it took", title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    rows = [
        ("speed", f"{report.tokens_per_s:.1f} tokens/s, prefill {report.prefill_s:.2f} s"),
        (
            "host memory for weights",
            (
                f"{format_size(report.host_weights_peak_bytes)}, {share:.0%} of "
                f"{format_size(report.weights_bytes_16bit)} at 16 bits (resident "
                f"{format_size(report.resident_bytes)})"
            ),
        ),
        ("process, peak", format_size(report.host_peak_rss_bytes)),
        (
            "staged",
            (
                f"{format_size(report.staged_bytes_per_token)} a token; {drive.units_staged:,} "
                f"units in {drive.commands:,} commands, read with {report.reader}"
            ),
        ),
        ("predicted", _predicted(report)),
        *([("far level", _far(report))] if report.predictor is not None else []),
        (
            "drive",
            f"{drive.nand_page_reads:,} NAND pages; {drive.units_from_dram:,} units from its DRAM",
        ),
        (
            "drive time, modelled",
            (
                f"NAND {format_ns(drive.nand_ns)}, program {format_ns(drive.program_ns)}, DRAM "
                f"{format_ns(drive.dram_ns)}, link {format_ns(drive.link_ns)}"
            ),
        ),
        ("host waited for the drive", f"{report.host_wait_s:.2f} s"),
    ]
    if report.predictor is not None:
        at = [name for name, _ in rows].index("predicted") + 1
        rows.insert(at, ("corrected", _corrected(report)))
    if report.recent_bytes:
        at = [name for name, _ in rows].index("predicted")
        rows.insert(at, ("not staged again", _recent(report)))
    if report.enforced:
        at = [name for name, _ in rows].index("process, peak") + 1
        rows.insert(at, ("process, limited", _enforced(report.enforced)))
    if report.recovered_units:
        rows.append(("recovered", _recovered(report)))
    for name, value in rows:
        table.add_row(name, value)
    return table


def _recent(report: "GenerationReport") -> str:
    return (
        f"{report.recent_units:,} chosen neurons, held since recent tokens in "
        f"{format_size(report.recent_bytes)}"
    )


def _enforced(enforced: "EnforcedReport") -> str:
    return (
        f"{format_size(enforced.peak_bytes)} at most, as the kernel measured, of "
        f"{format_size(enforced.limit_bytes)}: the budget and "
        f"{format_size(enforced.allowance_bytes)} "
        f"for interpreter and libraries ({format_size(enforced.start_bytes)} before any weights)"
    )


def _recovered(report: "GenerationReport") -> str:
    return (
        f"units: {report.recovered_units:,} lost in one copy, read from another "
        f"({report.drive.units_from_copies:,} reads); `csd verify {report.model}` lists them"
    )


def _predicted(report: "GenerationReport") -> str:
    if report.predictor is None:
        return "nothing: exact quality needs every neuron, and stages all that are not resident"
    if report.expert_recall is not None:
        return (
            f"experts, by the drive's {report.predictor}: {report.expert_recall:.0%} of those that "
            f"the routers chose were on their way before"
        )
    chosen = []
    if report.heads_predictor is not None:
        chosen.append(_chosen("KV groups", report.kept_heads, report.heads_predictor))
    if report.kept < 1.0 or not chosen:
        chosen.append(_chosen("neurons", report.kept, report.predictor))
    text = f"{', and '.join(chosen)}, {_ahead(report)}; what is resident counts as well"
    if report.recall is not None and report.covered is not None:
        text += (
            f". Of what the true input wanted, {report.recall:.0%} were chosen and "
            f"{report.covered:.0%} computed"
        )
    return text


def _chosen(what: str, share: float, predictor: str) -> str:
    return f"{share:.3g} of the {what}, chosen by the drive's {predictor} program"


def _ahead(report: "GenerationReport") -> str:
    if not report.lookahead:
        return "asked with what enters the layer"
    return f"asked {report.lookahead} layer{'s' if report.lookahead > 1 else ''} ahead"


def _far(report: "GenerationReport") -> str:
    waited = f"NAND waited for: {format_ns(round(report.nand_wait_ns_per_token))} a token"
    if report.far_predictor is None:
        why = f": {report.far_refused}" if report.far_refused else ""
        return f"none{why}. {waited}"
    return (
        f"{report.far_units:,} units brought into the drive's DRAM by its {report.far_predictor} "
        f"program, at least {report.far_lookahead} layers ahead; {report.far_units_used:,} of "
        f"them were staged from there. {waited}"
    )


def _corrected(report: "GenerationReport") -> str:
    if report.corrections:
        return f"{report.corrections:,} layers, with the drive's low bits for neurons left out"
    return "nothing: what was left out of an FFN counts for nothing"


def _by_role(packed: PackedModel, plan: Plan) -> dict[Role, tuple[int, int]]:
    """Units resident and in all, by role, in the order of the drive."""
    sums: dict[Role, tuple[int, int]] = {}
    for site in packed.sites:
        kept, count = sums.get(site.role, (0, 0))
        sums[site.role] = (kept + plan.resident_units[site.site], count + site.count)
    return sums


def _describe(packed: PackedModel, role: Role) -> str:
    names = {
        Role.EMBED: "embedding rows",
        Role.LM_HEAD: "output head rows",
        Role.NORMS: "norms",
        Role.FINAL_NORM: "final norm",
        Role.KV: "key and value projections",
        Role.HEADS: "KV groups of heads",
        Role.FFN: "FFN neurons",
        Role.ROUTER: "rows of routers, one an expert",
    }
    if role is Role.EMBED and head_site(packed).role is Role.EMBED:
        return "embedding and output head rows (tied)"
    return names[role]


def _bar(share: float, width: int = 20) -> str:
    filled = min(width, round(share * width))
    return "█" * filled + "░" * (width - filled) + f" {share:4.0%}"
