"""Who may import whom: import-linter over the tree, and over copies with a planted violation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import house_rules
import pytest

# The contract that a line appended to a file must break.
PLANTED = [
    ("device-rooms", "csd_device/ftl/__init__.py", "import csd_device.dram"),
    ("device-rooms", "csd_device/compute/__init__.py", "import csd_device.firmware"),
    ("device-flash", "csd_device/dram/__init__.py", "import csd_device.nand"),
    ("host-rooms", "host_client/io/__init__.py", "import host_client.driver"),
    ("host-rooms", "host_client/model/__init__.py", "import host_client.runtime"),
    ("two-sides", "host_client/driver/__init__.py", "import csd_device.drive"),
    ("protocol-alone", "csd_protocol/units.py", "import host_client"),
    ("stubs", "csd_device/drive.py", "import csd_protocol.csd.v1.csd_pb2"),
    ("no-ambient-time", "csd_device/nand/__init__.py", "import time"),
    ("no-ambient-time", "csd_device/firmware/commands.py", "def f():\n    import random"),
    ("device-without-torch", "csd_device/compute/__init__.py", "import torch"),
]


def lint_imports(folder: Path, *contracts: str) -> subprocess.CompletedProcess[str]:
    """Runs import-linter on the packages below `folder`, as `make lint` does here."""
    chosen = [word for contract in contracts for word in ("--contract", contract)]
    program = "import sys; from importlinter.cli import lint_imports_command; "
    program += "sys.path.insert(0, '.'); lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache", *chosen],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def copy_of_the_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    shutil.copy(house_rules.ROOT / "pyproject.toml", folder)
    for package in house_rules.PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(house_rules.ROOT / package, folder / package, ignore=ignored)
    return folder


def test_the_tree_keeps_every_contract() -> None:
    outcome = lint_imports(house_rules.ROOT)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.parametrize("contract, file, line", PLANTED)
def test_a_planted_import_is_caught(
    copy_of_the_tree: Path, contract: str, file: str, line: str
) -> None:
    path = copy_of_the_tree / file
    clean = path.read_text()
    path.write_text(f"{clean}\n{line}\n")
    try:
        outcome = lint_imports(copy_of_the_tree, contract)
    finally:
        path.write_text(clean)
    assert outcome.returncode == 1, outcome.stdout + outcome.stderr
    assert f"{house_rules.import_contracts()[contract]} BROKEN" in " ".join(outcome.stdout.split())


def test_every_contract_has_a_planted_violation() -> None:
    assert {contract for contract, _, _ in PLANTED} == set(house_rules.import_contracts())
