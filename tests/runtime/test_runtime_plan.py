"""The memory plan: never above its budget, and of use for every byte of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csd_protocol.packed import Extent, PackedModel, Part, Role, Site, UnitKind
from host_client.runtime.plan import (
    BUFFERS,
    FETCH_NEURONS,
    PART_BYTES,
    Plan,
    head_site,
    kv_bytes_per_token,
    make_plan,
    parse_budget,
)
from host_client.runtime.refusals import BudgetTooSmall, InvalidBudget

GIB = 1 << 30


def manifest(
    hidden: int, neurons: int, layers: int, groups: int, vocabulary: int, tied: bool
) -> PackedModel:
    """A LLaMA's manifest, whose sites lie nowhere. Four query heads a group, of hidden / 8 each."""
    head = hidden // 8
    norms = (Part(name="a", shape=(hidden,)), Part(name="b", shape=(hidden,)))
    sites: list[Site] = []

    def add(role: Role, kind: UnitKind, layer: int, count: int, rows: int, cols: int) -> None:
        sites.append(
            Site(
                site=len(sites),
                role=role,
                kind=kind,
                layer=layer,
                count=count,
                rows=rows,
                cols=cols,
                offset_bytes=0,
                first_crc=sum(site.count for site in sites),
                parts=norms if role is Role.NORMS else (),
            )
        )

    add(Role.EMBED, UnitKind.ROW, -1, vocabulary, 1, hidden)
    for layer in range(layers):
        add(Role.NORMS, UnitKind.TENSOR, layer, 1, 1, 2 * hidden)
        add(Role.KV, UnitKind.TENSOR, layer, 1, 2 * groups * head, hidden)
        add(Role.HEADS, UnitKind.HEAD, layer, groups, 2 * 4 * head, hidden)
        add(Role.FFN, UnitKind.NEURON, layer, neurons, 3, hidden)
    add(Role.FINAL_NORM, UnitKind.TENSOR, -1, 1, 1, hidden)
    if not tied:
        add(Role.LM_HEAD, UnitKind.ROW, -1, vocabulary, 1, hidden)
    return PackedModel(
        name="made up",
        family="llama",
        config={},
        dtype="float16",
        source="",
        fingerprint="",
        sites=tuple(sites),
        crc_table=Extent(offset_bytes=0, length_bytes=4 * sum(site.count for site in sites)),
    )


MODELS = st.builds(
    manifest,
    hidden=st.sampled_from([16, 64, 576, 2048]),
    neurons=st.integers(1, 3000),
    layers=st.integers(1, 12),
    groups=st.integers(1, 8),
    vocabulary=st.integers(2, 60_000),
    tied=st.booleans(),
)


def smallest(model: PackedModel, context: int) -> int:
    with pytest.raises(BudgetTooSmall) as refusal:
        make_plan(model, 0, context)
    return refusal.value.smallest_bytes


def whole(model: PackedModel, context: int) -> Plan:
    return make_plan(model, 1 << 50, context)


@given(MODELS, st.integers(1, 4096), st.floats(0, 1.5))
@settings(max_examples=60, deadline=None)
def test_no_plan_is_above_its_budget(model: PackedModel, context: int, share: float) -> None:
    least, most = smallest(model, context), whole(model, context).total_bytes
    budget = least + int(share * max(0, most - least))
    plan = make_plan(model, budget, context)
    assert plan.total_bytes <= budget
    assert plan.budget_bytes == budget
    counts = [(plan.resident_units[site.site], site.count) for site in model.sites]
    assert all(0 <= kept <= count for kept, count in counts)
    resident = sum(plan.resident_units[site.site] * site.unit_bytes for site in model.sites)
    assert plan.resident_bytes == resident
    assert plan.weights_bytes == model.weights_bytes


@given(MODELS, st.integers(1, 4096))
@settings(max_examples=40, deadline=None)
def test_the_smallest_budget_works_to_the_byte(model: PackedModel, context: int) -> None:
    least = smallest(model, context)
    assert make_plan(model, least, context).total_bytes <= least
    with pytest.raises(BudgetTooSmall, match=f"{least} bytes") as refusal:
        make_plan(model, least - 1, context)
    assert refusal.value.budget_bytes == least - 1


@given(MODELS, st.integers(1, 2048), st.floats(0, 1.2), st.floats(0, 1.2))
@settings(max_examples=80, deadline=None)
def test_a_larger_budget_never_stages_more(
    model: PackedModel, context: int, first: float, second: float
) -> None:
    """But for the grain: whole sites of a layer are kept or not, and neurons of all layers at once.

    A larger budget may keep one more layer's heads, which does not make the staging buffers
    smaller, where neurons of every layer would have.
    """
    least, most = smallest(model, context), whole(model, context).total_bytes
    spread = max(0, most - least)
    lower, higher = (least + int(share * spread) for share in sorted((first, second)))
    grain = model.layer_count * model.find(Role.FFN, 0).unit_bytes
    grain += sum(site.length_bytes for site in model.sites if site.layer == 0)
    less = make_plan(model, lower, context).staged_bytes_per_token
    more = make_plan(model, higher, context).staged_bytes_per_token
    assert more <= less + grain
    assert make_plan(model, higher + grain, context).staged_bytes_per_token <= less


@given(MODELS, st.integers(1, 2048), st.floats(0, 1.0))
@settings(max_examples=60, deadline=None)
def test_the_buffers_hold_any_layer_and_the_plan_what_a_token_needs(
    model: PackedModel, context: int, share: float
) -> None:
    least, most = smallest(model, context), whole(model, context).total_bytes
    plan = make_plan(model, least + int(share * max(0, most - least)), context)
    missing = {
        site.site: (site.count - plan.resident_units[site.site]) * site.unit_bytes
        for site in model.sites
    }
    for layer in range(model.layer_count):
        sites = [site for site in model.sites if site.layer == layer]
        whole_bytes = sum(missing[site.site] for site in sites if site.role is not Role.FFN)
        assert whole_bytes <= plan.buffer_bytes
        neurons = model.find(Role.FFN, layer)
        assert plan.buffer_bytes >= min(missing[neurons.site], PART_BYTES)
        assert plan.buffer_bytes >= neurons.unit_bytes or not missing[neurons.site]
        assert plan.keeps_all(model.find(Role.NORMS, layer))
    head = head_site(model)
    if missing[head.site]:
        assert plan.buffer_bytes >= head.unit_bytes
    layers = sum(missing[site.site] for site in model.sites if site.layer >= 0)
    assert plan.staged_bytes_per_token == layers + missing[head.site]


def test_everything_resident_needs_no_buffers() -> None:
    model = manifest(64, 160, 4, 2, 300, tied=False)
    plan = whole(model, 64)
    assert all(plan.keeps_all(site) for site in model.sites)
    assert plan.staged_bytes_per_token == plan.buffer_bytes == 0
    assert plan.resident_bytes == model.weights_bytes


@pytest.mark.parametrize("context", [1, 64, 2048])
def test_the_cache_is_accounted_for_at_its_full_context(context: int) -> None:
    layers, groups, hidden = 5, 2, 64
    model = manifest(hidden, 160, layers, groups, 300, tied=True)
    keys_and_values = 2 * groups * (hidden // 8) * 4
    assert kv_bytes_per_token(model) == layers * keys_and_values
    plan = whole(model, context)
    assert plan.kv_bytes == context * layers * keys_and_values
    assert smallest(model, context) == smallest(model, 0) + plan.kv_bytes


def test_the_cache_is_as_large_as_planned(lab, tokens_of) -> None:
    """What transformers allots for a full context is what the plan set aside."""
    model = lab.open("untied", context=20)
    cache = model(tokens_of(lab, "untied", 20), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == model.csd.plan.kv_bytes


def test_memory_is_what_the_plan_said(lab) -> None:
    model = lab.open("untied", lab.budget("untied", 0.5))
    runtime, plan = model.csd, model.csd.plan
    planned = plan.resident_bytes + BUFFERS * plan.buffer_bytes + plan.fetch_buffer_bytes
    assert runtime.weights_bytes == planned
    assert planned <= plan.total_bytes - plan.kv_bytes
    assert plan.fetch_buffer_bytes >= FETCH_NEURONS * runtime.packed.find(Role.FFN, 0).unit_bytes


MODEL = manifest(64, 100, 2, 1, 50, tied=True)


@pytest.mark.parametrize(
    "text, size",
    [
        ("5GiB", 5 * GIB),
        ("1.5 MB", 1_500_000),
        ("4096", 4096),
        (4096, 4096),
        ("100%", MODEL.weights_bytes),
        (" 50 % ", MODEL.weights_bytes // 2),
        ("0.5%", int(MODEL.weights_bytes * 0.005)),
        ("250%", int(MODEL.weights_bytes * 2.5)),
    ],
)
def test_budgets_are_sizes_or_shares(text: str | int, size: int) -> None:
    assert parse_budget(text, MODEL) == size


@pytest.mark.parametrize(
    "text", ["", "%", "much", "5 XiB", "half%", "nan%", "inf%", "-5%", "-1GiB", "5GiB%", "1e3 MB"]
)
def test_what_is_no_budget_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidBudget, match=r"neither a size like 5GiB nor a share .* like 45%"):
        parse_budget(text, MODEL)


def test_a_budget_that_is_too_small_names_one_that_works(lab) -> None:
    lab.packed("tied")
    with pytest.raises(BudgetTooSmall) as refusal:
        lab.open("tied", "1%")
    model = lab.open("tied", f"{refusal.value.smallest_bytes}")
    assert model.csd.plan.total_bytes <= refusal.value.smallest_bytes
