"""What a generation reports, and that its figures are the ones they are called."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from host_client.calibrate.preparation import build_predictor
from host_client.cli.reports import generation_table
from host_client.driver import Staged, StagedSite
from host_client.driver.commands import Timing
from host_client.runtime.generate import DriveReport, GenerationReport, generate, peak_rss_bytes
from host_client.runtime.tally import Tally

NAME = "tied"
TICK_NS = 1_000_000


class Words:
    """As much of a tokenizer as a report needs."""

    eos_token_id = 0
    chat_template = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def measure(lab: Any, model: Any, ids: Any, new: int) -> GenerationReport:
    model.generation_config.min_new_tokens = new
    ticks = itertools.count(0, TICK_NS)
    return generate(model, Words(), ids, new, lambda: next(ticks))


def test_a_report_of_an_exact_run(lab, tokens_of, greedy) -> None:
    budget = lab.budget(NAME, 0.4)
    model = lab.open(NAME, budget)
    ids = tokens_of(lab, NAME, 5)
    report = measure(lab, model, ids, 6)
    plan = model.csd.plan
    assert report.token_ids == greedy(lab.zoo.dense(NAME), ids)[0]
    assert report.text == " ".join(map(str, report.token_ids))
    assert (report.model, report.quality, report.predictor) == (NAME, "exact", None)
    assert (report.lookahead, report.kept, report.corrections, report.covered) == (None, 1, 0, None)
    assert "corrected" not in rows_of(report, model)
    assert (report.prompt_tokens, report.recall, report.late_units) == (5, None, 0)
    assert report.tokens_per_s == pytest.approx(1000)  # the clock ticks once a token
    assert report.prefill_s == pytest.approx(0.001)
    assert report.dram_budget_bytes == budget
    assert report.weights_bytes_16bit == model.csd.packed.weights_bytes
    assert report.resident_bytes == plan.resident_bytes
    assert report.kv_cache_bytes_planned == plan.kv_bytes
    assert report.host_weights_peak_bytes + plan.table_bytes + plan.kv_bytes <= budget
    assert report.reader == model.csd.reader.name
    staged = report.staged_bytes_per_token
    assert 0.5 * plan.staged_bytes_per_token <= staged <= 2 * plan.staged_bytes_per_token
    assert report.drive.commands > 0
    assert report.drive.units_staged > report.drive.units_from_dram
    assert min(report.drive.nand_ns, report.drive.link_ns, report.drive.dram_ns) > 0
    assert report.drive.program_ns == 0


def test_a_report_of_a_kept_fraction(lab, tokens_of) -> None:
    _, packed = lab.packed(NAME)
    lab.drive.load_program(
        0, build_predictor(lab.drive, packed, "shadow", lambda done, total: None)
    )
    model = lab.open(NAME, lab.budget(NAME, 0.4), 0.5, audit=True)
    report = measure(lab, model, tokens_of(lab, NAME, 5), 6)
    assert (report.quality, report.predictor) == ("0.5", "shadow")
    assert (report.lookahead, report.kept, report.corrections) == (1, 0.5, 0)
    assert 0 < report.recall <= report.covered <= 1
    rows = rows_of(report, model)
    assert "0.5 of the neurons, chosen by the drive's shadow program" in rows["predicted"]
    assert "asked 1 layer ahead" in rows["predicted"]
    assert f"{report.recall:.0%} were chosen and {report.covered:.0%} computed" in rows["predicted"]
    assert rows["corrected"].startswith("nothing")
    assert report.late_units == model.csd.tally.late_units > 0
    assert report.drive.program_ns > 0
    assert 0 < report.staged_bytes_per_token < model.csd.plan.staged_bytes_per_token


def test_a_report_of_heads(lab, tokens_of) -> None:
    _, packed = lab.packed(NAME)
    rollout = build_predictor(lab.drive, packed, "rollout", lambda done, total: None)
    lab.drive.load_program(0, rollout)
    model = lab.open(NAME, lab.budget(NAME, 0.0), "0.5+heads=0.5")
    report = measure(lab, model, tokens_of(lab, NAME, 5), 6)
    assert (report.kept, report.kept_heads, report.heads_predictor) == (0.5, 0.5, "rollout")
    shown = rows_of(report, model)["predicted"]
    assert shown.startswith(
        "0.5 of the KV groups, chosen by the drive's rollout program, and 0.5 of"
    )
    model.csd.close()
    alone = lab.open(NAME, lab.budget(NAME, 0.0), "1+heads=0.5")
    report = measure(lab, alone, tokens_of(lab, NAME, 5), 6)
    assert (report.quality, report.kept, report.predictor) == ("1+heads=0.5", 1, "rollout")
    assert "neurons" not in rows_of(report, alone)["predicted"]


def test_a_report_of_corrections(lab, tokens_of) -> None:
    _, packed = lab.packed(NAME)
    shadow = build_predictor(lab.drive, packed, "shadow", lambda done, total: None)
    lab.drive.load_program(0, shadow)
    model = lab.open(NAME, lab.budget(NAME, 0.4), "0.1+correct", lookahead=0)
    report = measure(lab, model, tokens_of(lab, NAME, 5), 6)
    assert (report.quality, report.lookahead, report.corrections) == ("0.1+correct", 0, 4 * 5)
    assert report.recall is report.covered is None
    rows = rows_of(report, model)
    assert rows["corrected"].startswith("20 layers")
    assert "asked with what enters the layer" in rows["predicted"]


def rows_of(report: GenerationReport, model: Any) -> dict[str, str]:
    """What people are shown, by the name of each row."""
    names, values = generation_table(report, model.csd.plan).columns
    return dict(zip(names.cells, values.cells, strict=True))


def test_one_token_has_no_rate(lab, tokens_of) -> None:
    report = measure(lab, lab.open(NAME), tokens_of(lab, NAME, 5), 1)
    assert len(report.token_ids) == 1
    assert report.tokens_per_s == 0


def test_the_fields_of_a_report_are_what_scripts_read(lab, tokens_of) -> None:
    dumped = measure(lab, lab.open(NAME), tokens_of(lab, NAME, 2), 2).model_dump(mode="json")
    assert set(dumped) == set(GenerationReport.model_fields)
    assert set(dumped["drive"]) == set(DriveReport.model_fields) <= set(Tally.__slots__)
    assert GenerationReport.model_validate(dumped).model_dump(mode="json") == dumped


def staged_site(predicted: Any, length: int) -> StagedSite:
    return StagedSite(
        site=0,
        predicted=predicted,
        units=None,
        unit_count=3,
        window_offset=0,
        length_bytes=length,
        lease=1,
        ready_ns=0,
        units_from_dram=1,
        nand_page_reads=2,
    )


def test_a_tally_adds_up() -> None:
    tally = Tally()
    timing = Timing(queue_ns=1, program_ns=2, nand_ns=3, dram_ns=4, link_ns=5, late_ns=9)
    chosen = SimpleNamespace(size=7)
    tally.add_staged(Staged((staged_site(chosen, 10), staged_site(None, 20)), timing))
    before = tally.snapshot()
    tally.add_staged(Staged((staged_site(None, 5),), timing))
    assert (tally.commands, tally.units_staged, tally.staged_bytes) == (2, 9, 35)
    assert (tally.predicted_units, tally.units_from_dram, tally.nand_page_reads) == (7, 3, 6)
    later = tally.since(before)
    assert (later.commands, later.staged_bytes, later.predicted_units) == (1, 5, 0)
    assert (later.queue_ns, later.program_ns, later.nand_ns) == (1, 2, 3)
    assert (later.dram_ns, later.link_ns) == (4, 5)
    assert tally.recall is None
    tally.wanted_units, tally.wanted_in_time = 8, 6
    assert tally.recall == 0.75


def test_peak_memory_is_the_kernels(tmp_path) -> None:
    assert peak_rss_bytes() > 50 << 20
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmHWM:\t   12 kB\n")
    assert peak_rss_bytes(status) == 12 << 10
    status.write_text("Name:\tx\n")
    with pytest.raises(OSError, match="has no VmHWM"):
        peak_rss_bytes(status)
