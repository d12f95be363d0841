"""Settings for all tests: how they are divided among processes, and which examples are tried.

Tests that share what is dear to make stay together in one process: those of `SHARED_FOLDERS`
share a packed model or a daemon, the others what their file makes. Each process leaves the other
processes their cores: OpenMP's threads spin while they wait.
"""

import os
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import settings

SHARED_FOLDERS = ("end_to_end", "integration")

settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By file, and the shared folders whole."""
    from xdist.scheduler import LoadScopeScheduling

    class FolderScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            folder = PurePosixPath(file).parent
            return str(folder) if folder.name in SHARED_FOLDERS else file

    return FolderScheduling(config, log)
