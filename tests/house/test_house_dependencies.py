"""What the packages import is what pyproject.toml declares, side by side, and nothing more."""

import ast
import re
import runpy
import sys
from importlib.metadata import packages_distributions

import house_rules
import pytest

DEPENDENCIES = runpy.run_path(str(house_rules.ROOT / "tools" / "dependencies.py"))
# Plugins and programs; what transformers wants for GGUF files; what only generated stubs import.
NOT_IMPORTED = {"accelerate", "pytest-timeout", "pytest-xdist", "import-linter", "protobuf"}
SIDES = [
    (["csd_protocol"], []),
    (["csd_protocol", "csd_device"], ["device"]),
    (["csd_protocol", "host_client"], ["host", "plot"]),
    ([*house_rules.PACKAGES, "benchmarks", "tests"], ["device", "host", "plot", "test"]),
]


def imported_distributions(*folders: str) -> set[str]:
    """Names of the distributions that sources below `folders` import."""
    providers = packages_distributions()
    found: set[str] = set()
    for path in house_rules.python_files(*folders):
        for module, _ in house_rules.imported_modules(ast.parse(path.read_text())):
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names:
                found |= set(providers.get(top, []))
    return {canonical(name) for name in found} - {"flash-csd"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared_distributions(extras: list[str]) -> set[str]:
    requirements = DEPENDENCIES["requirements_of"](extras)
    return {canonical(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}


@pytest.mark.parametrize("folders, extras", SIDES, ids=lambda value: "+".join(value) or "base")
def test_imports_are_declared(folders: list[str], extras: list[str]) -> None:
    assert imported_distributions(*folders) - declared_distributions(extras) == set()


def test_nothing_is_declared_that_nobody_uses() -> None:
    folders, extras = SIDES[-1]
    used = imported_distributions(*folders) | NOT_IMPORTED
    assert declared_distributions(extras) - used == set()


def test_the_stubs_run_with_the_oldest_versions_that_are_declared() -> None:
    """Generated code refuses a runtime older than its generator."""
    stubs = house_rules.GENERATED / "v1"
    grpc = re.search(r"GENERATED_VERSION = '([\d.]+)'", (stubs / "csd_pb2_grpc.py").read_text())
    protobuf = re.search(r"PUBLIC,\s+(\d+),\s+(\d+),\s+(\d+),", (stubs / "csd_pb2.py").read_text())
    assert grpc is not None
    assert protobuf is not None
    requirements = DEPENDENCIES["requirements_of"]([])
    assert f"grpcio>={grpc[1]}" in requirements
    assert f"protobuf>={'.'.join(protobuf.groups())}" in requirements


def test_the_lock_pins_what_is_declared() -> None:
    lock = (house_rules.ROOT / "requirements.lock").read_text()
    pinned = {line.split("==")[0] for line in lock.splitlines() if "==" in line}
    assert declared_distributions(["dev"]) <= pinned
    assert "://" not in lock


def test_an_undeclared_import_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "planted.py").write_text("def f():\n    import mypy.api\n")
    monkeypatch.setattr(house_rules, "ROOT", tmp_path)
    assert imported_distributions(".") - declared_distributions(["host"]) == {"mypy"}
