"""Kill -9 in the middle of a generation, of either side: nobody hangs, nothing is lost."""

import signal
from typing import Any

from real_model import MODEL, CommandLine, Device, Running, await_true, generate

EXIT_DRIVE, EXIT_INTERRUPTED = 4, 130


def leases(csd: CommandLine, device: Device) -> int:
    return csd("identify", "--json", drive=device).answer["window"]["leases"]


def test_daemon_killed(
    csd: CommandLine,
    own_device: Device,
    exact_answer: dict[str, Any],
    kept_answer: dict[str, Any],
) -> None:
    talk = Running.generation(own_device)
    talk.await_text()
    own_device.kill()
    run = talk.finished()
    assert run.status == EXIT_DRIVE, run.stderr
    assert f"error: the drive at {own_device.address} is gone" in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr
    assert len(run.stderr.splitlines()) < 4, run.stderr
    own_device.restart()
    assert generate(csd, own_device)["token_ids"] == exact_answer["token_ids"]
    kept = generate(csd, own_device, "--quality", "0.5")
    assert kept["predictor"] == "rollout"
    assert kept["token_ids"] == kept_answer["token_ids"]


def test_host_killed(csd: CommandLine, own_device: Device, exact_answer: dict[str, Any]) -> None:
    talk = Running.generation(own_device)
    talk.await_text()
    talk.send(signal.SIGKILL)
    assert talk.finished().status == -signal.SIGKILL
    await_true(lambda: leases(csd, own_device) == 0, "the dead host's leases")
    assert generate(csd, own_device)["token_ids"] == exact_answer["token_ids"]


def test_host_interrupted(csd: CommandLine, own_device: Device) -> None:
    talk = Running.generation(own_device)
    talk.await_text()
    talk.send(signal.SIGINT)
    run = talk.finished()
    assert run.status == EXIT_INTERRUPTED, run.stderr
    assert "Traceback" not in run.stderr
    await_true(lambda: leases(csd, own_device) == 0, "the interrupted host's leases")
    assert MODEL in csd("models", drive=own_device).stdout


def test_an_interrupted_pack_goes_on(csd: CommandLine, own_device: Device) -> None:
    """A model taken off and half packed again is refused as incomplete, then completed."""
    assert csd("remove", MODEL, drive=own_device).status == 0
    packing = Running(own_device, "pack", MODEL, "--no-calibrate")
    await_true(lambda: "packing" in csd("models", drive=own_device).stdout, "a pack under way")
    packing.send(signal.SIGKILL)
    packing.finished()
    refused = csd("generate", MODEL, "--prompt", "x", drive=own_device).refused(3)
    assert f"{MODEL} on the drive is not complete" in refused
    assert csd("pack", MODEL, "--no-calibrate", drive=own_device).status == 0
    assert csd("plan", MODEL, "--json", drive=own_device).answer["model"] == MODEL
