"""What `csd generate --json` and `csd bench quality` say, and what a kept fraction costs."""

import json
from pathlib import Path
from typing import Any

import pytest
from real_model import BUDGET, MODEL, PROMPTS, CommandLine, Device, Reference, generate
from transformers import PreTrainedTokenizerBase

WEIGHTS_BYTES = 269_030_016  # SmolLM2-135M at 16 bits
ANSWER_TOKENS = 16
KINDS = {
    "model": str,
    "quality": str,
    "text": str,
    "token_ids": list,
    "tokens_per_s": float,
    "prefill_s": float,
    "dram_budget_bytes": int,
    "weights_bytes_16bit": int,
    "host_weights_peak_bytes": int,
    "host_peak_rss_bytes": int,
    "staged_bytes_per_token": float,
    "reader": str,
    "drive": dict,
}
DRIVE_KEYS = (
    *("nand_page_reads", "nand_ns", "program_ns", "link_ns"),
    *("units_staged", "units_from_dram"),
)


@pytest.mark.parametrize("which", ["exact_answer", "kept_answer"])
def test_json_has_what_was_promised(which: str, request: pytest.FixtureRequest) -> None:
    answer = request.getfixturevalue(which)
    for key, kind in KINDS.items():
        assert type(answer[key]) is kind, key
    for key in DRIVE_KEYS:
        assert type(answer["drive"][key]) is int, key
    assert answer["model"] == MODEL
    assert answer["weights_bytes_16bit"] == WEIGHTS_BYTES
    assert answer["dram_budget_bytes"] == int(0.45 * WEIGHTS_BYTES)
    assert 0 < answer["host_weights_peak_bytes"] <= answer["dram_budget_bytes"]
    assert answer["dram_budget_bytes"] < answer["host_peak_rss_bytes"] < 4 << 30
    assert answer["tokens_per_s"] > 0
    assert answer["prefill_s"] > 0
    assert answer["reader"] in {"io_uring", "threads"}
    drive = answer["drive"]
    assert 0 < drive["units_from_dram"] <= drive["units_staged"]
    assert drive["link_ns"] > 0


def test_exact_answer_is_plain_transformers(
    exact_answer: dict[str, Any], reference: Reference, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert exact_answer["quality"] == "exact"
    assert exact_answer["recall"] is None
    assert exact_answer["drive"]["program_ns"] == 0
    assert exact_answer["token_ids"] == reference.spoken[0].tokens[:ANSWER_TOKENS]
    assert exact_answer["text"] == tokenizer.decode(exact_answer["token_ids"])


def test_kept_fraction_stages_less(
    exact_answer: dict[str, Any], kept_answer: dict[str, Any]
) -> None:
    assert kept_answer["quality"] == "0.5"
    assert (kept_answer["predictor"], kept_answer["lookahead"]) == ("rollout", 1)
    assert (kept_answer["kept"], kept_answer["corrections"]) == (0.5, 0)
    assert 0 < len(kept_answer["token_ids"]) <= ANSWER_TOKENS
    assert kept_answer["text"].strip()
    assert 0 < kept_answer["recall"] <= 1
    assert kept_answer["drive"]["program_ns"] > 0
    assert 0 < kept_answer["staged_bytes_per_token"] < exact_answer["staged_bytes_per_token"]
    assert exact_answer["staged_bytes_per_token"] < WEIGHTS_BYTES


def test_a_tenth_and_a_correction_stage_least(
    csd: CommandLine, device: Device, kept_answer: dict[str, Any]
) -> None:
    corrected = generate(csd, device, "--quality", "0.1+correct")
    assert (corrected["quality"], corrected["predictor"]) == ("0.1+correct", "rollout")
    assert corrected["corrections"] == 30 * (len(corrected["token_ids"]) - 1)
    assert 0.7 < corrected["recall"] <= corrected["covered"] <= 1
    assert corrected["staged_bytes_per_token"] < 0.5 * kept_answer["staged_bytes_per_token"]
    assert corrected["text"].strip()


def test_answers_are_the_same_again(
    csd: CommandLine, device: Device, kept_answer: dict[str, Any]
) -> None:
    """Also read by threads: only what was fast and how often the drive's DRAM hit may differ."""
    again = generate(csd, device, "--quality", "0.5", "--reader", "threads")
    assert again["reader"] == "threads"
    for key in ("token_ids", "recall", "staged_bytes_per_token", "late_units"):
        assert again[key] == kept_answer[key], key


def test_a_chat_goes_to_the_terminal(csd: CommandLine, device: Device) -> None:
    run = csd(
        *("generate", MODEL, "--dram", BUDGET, "--prompt", PROMPTS[0], "--max-new-tokens", 8),
        drive=device,
    )
    assert run.status == 0
    assert "olid" in run.stdout
    assert "<|im_" not in run.stdout
    for said in ("what it took", "NAND", "predicted", "resident", "tokens/s"):
        assert said in run.stderr


def test_quality_is_measured_on_real_text(csd: CommandLine, device: Device, tmp_path: Path) -> None:
    """In the lab, from calibration to picture; the drive has no part in it."""
    plot, to = tmp_path / "plot.png", tmp_path / "figures.json"
    settings = ("oracle:0.5", "rollout@1:0.5", "rollout@1:0.1+correct+bits=3+fit")
    asked = [word for setting in settings for word in ("--setting", setting)]
    told = csd(
        *("bench", "quality", MODEL, "--tokens", 128, "--calibration", 128, *asked),
        *("--plot", plot, "--to", to, "--markdown"),
        drive=device,
    )
    assert told.status == 0, told.stderr
    assert [line.split(" | ")[0] for line in told.stdout.splitlines()[-3:]] == [
        f"| {setting}" for setting in settings
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")
    measured = json.loads(to.read_text())
    assert (measured["model"], measured["tokens"]) == (MODEL, 128)
    assert measured["provenance"]["calibration_tokens"] == 128
    oracle, rollout, corrected = measured["outcomes"]
    assert 5 < measured["dense_perplexity"] < 80
    assert 0 < oracle["kl_nats"] < rollout["kl_nats"]
    assert 0.5 < rollout["recall"] < oracle["recall"] == 1
    assert corrected["staged_bytes_per_token"] < 0.25 * rollout["staged_bytes_per_token"]
    assert [layer["layer"] for layer in rollout["layers"]] == list(range(30))


def test_quality_is_measured_through_a_drive(csd: CommandLine, device: Device) -> None:
    measured = csd(
        *("bench", "quality", MODEL, "--through-drive", "--tokens", 64, "--json"),
        *("--setting", "exact", "--setting", "rollout@1:0.5"),
        drive=device,
    ).answer
    (kept,) = measured["outcomes"]
    assert measured["provenance"]["measured"] == "through a drive"
    assert kept["name"] == "rollout@1:0.5"
    assert 5 < measured["dense_perplexity"] < 80
    assert 0 < kept["kl_nats"] < 1
    assert 0.5 < kept["agreement"] < 1
    assert 0.5 < kept["recall"] < 1
    assert kept["computed_share"] == 0.5
    assert kept["staged_bytes_per_token"] < measured["dense_bytes_per_token"]


def test_what_is_no_setting_is_refused(csd: CommandLine, device: Device) -> None:
    for wrong, why in (("psychic:0.5", "is no setting"), ("rollout@1:0.5+fit", "leave bits")):
        refused = csd(
            *("bench", "quality", MODEL, "--through-drive", "--setting", wrong), drive=device
        )
        assert refused.status == 2
        assert why in " ".join(refused.stderr.split())


def test_plan_keeps_to_its_budget(csd: CommandLine, device: Device) -> None:
    plans = [
        csd("plan", MODEL, "--dram", dram, "--json", drive=device).answer
        for dram in ("20%", "45%", "200MiB")
    ]
    for plan in plans:
        assert plan["resident_bytes"] < plan["total_bytes"] <= plan["dram_budget_bytes"]
    staged = [plan["staged_bytes_per_token"] for plan in plans]
    assert staged == sorted(staged, reverse=True)
    assert staged[-1] > 0
    for plan in plans:
        drives = [entry["drive"] for entry in plan["modelled"]]
        assert drives == ["cloud", "edge", "end", "edge-gen5"]
        for entry in plan["modelled"]:
            parts = [entry[f"{name}_ns"] for name in ("nand", "dram", "link", "host")]
            assert max(parts) <= entry["token_ns"] <= sum(parts)
            assert entry["compute_ns"] == 0  # exact: no program runs


@pytest.mark.parametrize("rate", ["fast", "0"])
def test_a_host_rate_is_a_size(csd: CommandLine, device: Device, rate: str) -> None:
    csd("plan", MODEL, "--host-rate", rate, drive=device).refused(2)


def test_the_drive_speaks_of_itself(csd: CommandLine, device: Device) -> None:
    told = csd("identify", "--json", drive=device).answer
    assert told["controller"]["model"] == "edge-gen5"
    assert told["window"]["path"] == str(device.window)
    kinds = {(entry["kind"], entry["active"]) for entry in told["programs"]["programs"]}
    assert kinds == {("rollout", True), ("frequency", True)}
    for page in ("smart", "error", "stage"):
        assert csd("log", page, "--json", drive=device).answer
        assert csd("log", page, drive=device).status == 0
    listed = csd("models", drive=device).stdout
    assert MODEL in listed
    assert "complete" in listed
    assert "rollout" in csd("predictor", "list", drive=device).stdout
