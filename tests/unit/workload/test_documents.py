"""The drive of docs/DRIVES.md and the job file of docs/WORKLOADS.md, as a reader would use them."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from csd_device.config import load_config
from csd_device.service.cli import app

DOCS = Path(__file__).parents[3] / "docs"


def block(page: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_drive_of_the_example_reads_as_fast_as_its_datasheet_says(tmp_path: Path) -> None:
    path = tmp_path / "client-1tb.toml"
    path.write_text(block("DRIVES.md", "toml"))
    config = load_config(path)
    assert config.capacity_bytes == pytest.approx(1e12, rel=1e-6)
    assert config.geometry.layout == "8x2x4"
    options = "--pattern seqread --size 1MiB --depth 8 --requests 400 --precondition 0.001 --json"
    done = CliRunner().invoke(app, ["workload", "--drive", str(path), *options.split()])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["bandwidth_bytes_per_s"] == pytest.approx(7e9, rel=0.03)


def test_the_job_file_of_the_example_runs(tmp_path: Path) -> None:
    path = tmp_path / "mix.fio"
    path.write_text(block("WORKLOADS.md", "ini").replace("100ms", "1ms").replace("=500", "=5"))
    options = ["--fio", str(path), "--precondition", "0.01", "--json"]
    done = CliRunner().invoke(app, ["workload", "--drive", "end-gen4", *options])
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert [job["name"] for job in said["jobs"]] == ["fill", "reads", "mixed"]
    assert said["ignored"] == ["ioengine", "direct"]
