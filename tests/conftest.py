"""What tests of several folders share."""

import os

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from host_client.runtime.cgroup import Cgroup, Hierarchy, NoCgroup


def pytest_configure() -> None:
    """Deals the cores out to pytest's workers, before anything loads torch.

    Torch's threads spin while they wait for each other: more of them than cores, and each pass
    takes several times as long. Processes that a test starts inherit what is set here.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
    if not workers:  # the process that starts the workers, or the only one
        return
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


class EndToEndOnOneWorker(LoadScopeScheduling):
    """One worker runs all end-to-end tests, and begins with them; other tests come singly."""

    def _split_scope(self, nodeid: str) -> str:
        return "end_to_end" if nodeid.startswith("tests/end_to_end/") else nodeid


@pytest.hookimpl(optionalhook=True)  # without xdist there is no such hook
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return EndToEndOnOneWorker(config, log)


@pytest.fixture(scope="session")
def hierarchy() -> Hierarchy:
    """Control groups that limit memory. Skips where none can be made: not root, none delegated."""
    try:
        found = Hierarchy.find()
        with Cgroup.made(found, "-probe"):
            return found
    except NoCgroup as error:
        pytest.skip(str(error))
