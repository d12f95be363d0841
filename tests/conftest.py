"""What tests of several folders share."""

import pytest

from host_client.runtime.cgroup import Cgroup, Hierarchy, NoCgroup


@pytest.fixture(scope="session")
def hierarchy() -> Hierarchy:
    """Control groups that limit memory. Skips where none can be made: not root, none delegated."""
    try:
        found = Hierarchy.find()
        with Cgroup.made(found, "-probe"):
            return found
    except NoCgroup as error:
        pytest.skip(str(error))
