"""Shared memory in huge pages: what a file holds stays, whether the kernel has any or not."""

import os
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import pytest

from csd_device.dram.huge_pages import HUGE_PAGE_BYTES, collapse


@pytest.mark.parametrize("size_bytes", [HUGE_PAGE_BYTES * 3, HUGE_PAGE_BYTES * 2 + 4096, 64])
@pytest.mark.parametrize("folder", ["/dev/shm", "/var/tmp"])
def test_what_the_file_holds_stays(folder: str, size_bytes: int) -> None:
    held = np.random.default_rng(0).integers(0, 256, size_bytes, dtype=np.uint8).tobytes()
    with NamedTemporaryFile(dir=folder) as file:
        file.write(held)
        file.flush()
        collapse(file.fileno(), size_bytes)
        assert Path(file.name).read_bytes() == held
        assert os.fstat(file.fileno()).st_size == size_bytes


def test_no_mapping_is_left_behind() -> None:
    maps = Path("/proc/self/maps")
    with NamedTemporaryFile(dir="/dev/shm") as file:
        os.posix_fallocate(file.fileno(), 0, HUGE_PAGE_BYTES * 2)
        collapse(file.fileno(), HUGE_PAGE_BYTES * 2)
        assert file.name not in maps.read_text()
