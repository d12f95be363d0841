"""`csd-device workload` as it is typed: stable keys, and what it refuses."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from csd_device.service.cli import app


def workload(*options: str) -> Result:
    return CliRunner().invoke(app, ["workload", "--drive", "tiny", *options])


DIRECTION = {"requests", "bytes", "iops", "bandwidth_bytes_per_s", "latency_ns"}


def test_json_has_stable_keys(tmp_path: Path) -> None:
    done = workload(
        *"--pattern mixed --size 16KiB --depth 8 --requests 200 --precondition 0.1 --json".split(),
        *("--media", str(tmp_path / "drive.csd")),
    )
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert set(said) == {
        "drive", "workload", "seed", "filled_bytes", "holding_data", "elapsed_ns", "requests",
        "iops", "bandwidth_bytes_per_s", "reads", "writes", "channel_utilisation",
        "die_utilisation", "write_amplification", "superblocks_erased", "jobs", "ignored", "trace",
    }  # fmt: skip
    assert set(said["reads"]) == set(said["writes"]) == DIRECTION
    assert list(said["reads"]["latency_ns"]) == ["mean", "p50", "p99", "p99_9", "max"]
    assert said["requests"] == said["reads"]["requests"] + said["writes"]["requests"] == 200
    assert said["holding_data"] == 1.0
    assert said["write_amplification"] >= 0.9
    again = workload(
        *"--pattern randwrite --requests 1".split(), *("--media", str(tmp_path / "drive.csd"))
    )
    assert again.exit_code == 1
    assert "say --overwrite if it may be lost" in again.stderr


def test_a_fio_file_and_a_trace_for_people(tmp_path: Path) -> None:
    fio, trace = tmp_path / "job.fio", tmp_path / "trace.csv"
    fio.write_text("[reads]\nrw=randread\nnumber_ios=50\nioengine=psync\n")
    trace.write_text("128166372003061629,usr,0,Read,512,4096,1\n")
    done = workload("--fio", str(fio), "--precondition", "0.01")
    assert done.exit_code == 0, done.stderr
    assert "job.fio on tiny: 50 requests" in done.stdout
    assert "ignored, as they concern the host: ioengine" in done.stdout
    done = workload("--trace", str(trace), "--precondition", "0.01")
    assert "1 requests widened to whole blocks" in done.stdout
    assert "held no data" in done.stdout


@pytest.mark.parametrize(
    "options, message",
    [
        ("", "say one of --pattern, --fio and --trace"),
        ("--pattern randread --fio x.fio --requests 1", "say one of"),
        ("--pattern randread", "neither a number of requests nor a time"),
        ("--pattern randread --size 3000 --requests 1", "no multiple of 4096"),
        ("--pattern randread --size big --requests 1", "'big' is not a size"),
        ("--fio missing.fio", "missing.fio"),
    ],
)
def test_refusals(options: str, message: str) -> None:
    refused = workload(*options.split(), "--precondition", "0")
    assert refused.exit_code == 1
    assert message in refused.stderr
