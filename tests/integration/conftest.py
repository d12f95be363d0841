"""The drive that integration tests talk to: the one in CSD_DRIVE, or a small one of their own."""

import os
from collections.abc import Iterator

import pytest

from host_client.driver import Drive
from host_client.driver.embedded import Daemon


@pytest.fixture(scope="session")
def drive_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a running drive that all integration tests share.

    With CSD_DRIVE set (containers) it is a daemon elsewhere; tests must not end it. Without, it is
    a daemon of the preset `tiny`, time off.
    """
    address = os.environ.get("CSD_DRIVE")
    if address:
        yield address
        return
    media = tmp_path_factory.mktemp("media") / "drive.csd"
    daemon = Daemon.start(media, "tiny", "off", start_timeout_s=120.0)
    yield daemon.address
    daemon.stop()


@pytest.fixture
def drive(drive_address: str) -> Iterator[Drive]:
    """A connection of its own to the shared drive; a new host each time."""
    with Drive.connect(drive_address) as connected:
        yield connected
