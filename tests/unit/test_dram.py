"""Arena and window: budgets, leases, and who they belong to."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from csd_device.dram import Arena, Window
from csd_device.errors import DramExceeded, DriveRefused, NoLease, WindowFull
from csd_protocol.status import Status

SIZE = 64 * 1024


@pytest.fixture
def window(tmp_path: Path):
    opened = Window(tmp_path / "window", SIZE)
    yield opened
    opened.close()


def test_arena_refuses_what_does_not_fit_and_names_the_figures() -> None:
    arena = Arena(1 << 20)
    arena.allot("mapping", 1 << 19)
    with pytest.raises(DramExceeded, match=r"window asks for 768.0 KiB .* 512.0 KiB of 1.0 MiB"):
        arena.allot("window", 3 << 18)
    assert arena.report() == {"mapping": 1 << 19, "free": 1 << 19, "total": 1 << 20}
    arena.free("mapping")
    assert arena.allot("window", 1 << 20).size_bytes == 1 << 20
    assert arena.free_bytes == 0


def test_arena_resize_counts_what_the_share_had() -> None:
    arena = Arena(1000)
    arena.allot("cache", 600)
    arena.resize("cache", 900)
    with pytest.raises(DramExceeded):
        arena.resize("cache", 1001)
    assert arena.report()["cache"] == 900


def test_window_is_a_file_the_host_can_read(window: Window) -> None:
    lease = window.lease(1000, "a")
    window.view(lease.offset, lease.length)[:] = 42
    with window.path.open("rb") as file:
        file.seek(lease.offset)
        assert file.read(1000) == bytes([42]) * 1000
    state = window.path.stat()
    assert stat.S_IMODE(state.st_mode) == 0o644
    assert state.st_blocks * 512 >= SIZE


def test_window_close_unlinks(tmp_path: Path) -> None:
    window = Window(tmp_path / "w", SIZE)
    view = window.view(0, 64)
    window.close()
    assert not (tmp_path / "w").exists()
    view[:] = 1


def test_leases_are_aligned_and_apart(window: Window) -> None:
    leases = [window.lease(length, "a") for length in (1, 64, 65, 4000)]
    assert [lease.offset for lease in leases] == [0, 64, 128, 256]
    assert window.leased_bytes == 64 + 64 + 128 + 4032
    assert window.leases_of("a") == leases


def test_full_window_names_figures_and_is_retryable(window: Window) -> None:
    window.lease(SIZE - 64, "a")
    with pytest.raises(WindowFull, match=r"4.0 KiB does not fit: 64 B of .* 64.0 KiB") as caught:
        window.lease(4096, "a")
    assert caught.value.status is Status.WINDOW_FULL
    assert caught.value.status.value.retryable


def test_release_coalesces(window: Window) -> None:
    leases = [window.lease(SIZE // 4, "a") for _ in range(4)]
    for index in (0, 2, 1, 3):
        window.release(leases[index].id, "a")
    assert window.largest_free_bytes == SIZE
    assert window.lease(SIZE, "a").offset == 0


def test_a_lease_belongs_to_its_host(window: Window) -> None:
    lease = window.lease(100, "a")
    for lease_id, owner in ((lease.id, "b"), (lease.id + 1, "a")):
        with pytest.raises(NoLease):
            window.release(lease_id, owner)
    window.lease(100, "b")
    assert window.release_owner("a") == 1
    assert window.release_owner("a") == 0
    assert window.lease_count == 1


def test_random_leases_never_overlap(window: Window) -> None:
    rng = np.random.default_rng(5)
    held = {}
    for _ in range(2000):
        if held and rng.random() < 0.5:
            lease = held.pop(int(rng.choice(list(held))))
            window.release(lease.id, "a")
        else:
            try:
                lease = window.lease(int(rng.integers(1, 6000)), "a")
            except WindowFull:
                continue
            held[lease.id] = lease
        pieces = sorted((lease.offset, lease.offset + lease.length) for lease in held.values())
        ends = [0, *(end for _, end in pieces)]
        assert all(start >= end for (start, _), end in zip(pieces, ends, strict=False))
        assert ends[-1] <= SIZE
    window.release_owner("a")
    assert window.free_bytes == window.largest_free_bytes == SIZE


def test_a_window_in_use_is_refused_and_a_stale_one_replaced(tmp_path: Path) -> None:
    path = tmp_path / "w"
    first = Window(path, SIZE)
    with pytest.raises(DriveRefused, match="in use by another daemon"):
        Window(path, SIZE)
    first.close()
    path.write_bytes(b"left by a dead daemon")
    second = Window(path, SIZE)
    assert not second.view(0, SIZE).any()
    second.close()


def test_a_window_larger_than_its_filesystem_is_refused(tmp_path: Path) -> None:
    state = os.statvfs(tmp_path)
    too_much = state.f_blocks * state.f_frsize * 2 // 4096 * 4096
    with pytest.raises(DriveRefused, match="window"):
        Window(tmp_path / "w", too_much)
    assert not (tmp_path / "w").exists()
