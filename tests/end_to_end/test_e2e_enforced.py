"""`csd generate --enforce`: the budget as a limit that the kernel keeps, on the real model."""

from typing import Any

from real_model import MODEL, CommandLine, Device, generate

from host_client.runtime.cgroup import PREFIX, Hierarchy
from host_client.runtime.memory_limit import ALLOWANCE_BYTES, allowed


def test_the_answer_is_the_same_and_the_kernel_says_what_it_took(
    csd: CommandLine, device: Device, exact_answer: dict[str, Any], hierarchy: Hierarchy
) -> None:
    said = generate(csd, device, "--enforce")
    assert said["text"] == exact_answer["text"]
    enforced = said["enforced"]
    assert enforced["limit_bytes"] == said["dram_budget_bytes"] + enforced["allowance_bytes"]
    allowance = allowed(enforced["start_bytes"], said["dram_budget_bytes"])
    assert enforced["allowance_bytes"] == allowance > ALLOWANCE_BYTES
    assert enforced["start_bytes"] < enforced["peak_bytes"] <= enforced["limit_bytes"]
    assert enforced["peak_bytes"] > said["host_weights_peak_bytes"]
    assert not list(hierarchy.own.glob(f"{PREFIX}*"))


def test_a_long_prompt_stays_within_the_limit(
    csd: CommandLine, device: Device, hierarchy: Hierarchy
) -> None:
    asked = ("--dram", "45%", "--prompt-tokens", 2000, "--max-new-tokens", 2, "--json")
    enforced = csd("generate", MODEL, *asked, "--enforce", drive=device).answer["enforced"]
    assert enforced["peak_bytes"] <= enforced["limit_bytes"]


def test_a_refusal_inside_of_the_group_is_the_command_s_own(
    csd: CommandLine, device: Device, hierarchy: Hierarchy
) -> None:
    asked = ("generate", "nothing-of-this-name", "--prompt", "x", "--enforce")
    message = csd(*asked, drive=device).refused(3)
    assert "nothing-of-this-name" in message
    assert not list(hierarchy.own.glob(f"{PREFIX}*"))
