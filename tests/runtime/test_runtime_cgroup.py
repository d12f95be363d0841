"""Control groups: what the kernel keeps and measures, what is left behind, where there are none."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from csd_protocol.units import MIB
from host_client.runtime.cgroup import PREFIX, Cgroup, Hierarchy, NoCgroup

MAKER = """
import sys
from host_client.runtime.cgroup import Cgroup, Hierarchy
with Cgroup.made(Hierarchy.find()) as group:
    print(group.folder, flush=True)
    sys.stdin.read()
"""


def run_in(group: Cgroup, code: str) -> int:
    words = [sys.executable, "-S", "-c", code]
    return subprocess.run(group.command(words), check=False, stderr=subprocess.DEVNULL).returncode


def test_the_kernel_measures_what_a_process_touches(hierarchy: Hierarchy) -> None:
    with Cgroup.made(hierarchy, "-measured") as group:
        group.limit(256 * MIB)
        assert run_in(group, f"bytearray({64 * MIB})") == 0
        assert 64 * MIB <= group.peak_bytes < 96 * MIB
        assert group.kills == 0
    assert not group.folder.exists()


def test_page_cache_is_used_and_not_kept(hierarchy: Hierarchy, tmp_path: Path) -> None:
    file = tmp_path / "file"
    with Cgroup.made(hierarchy, "-cached") as group:
        assert run_in(group, f"open('{file}', 'wb').write(bytes({32 * MIB}))") == 0
        assert group.usage_bytes > 32 * MIB
        assert group.kept_bytes < 16 * MIB


def test_a_process_beyond_the_limit_is_ended(hierarchy: Hierarchy) -> None:
    with Cgroup.made(hierarchy, "-limited") as group:
        group.limit(48 * MIB)
        assert run_in(group, f"bytearray({128 * MIB})") == -signal.SIGKILL
        assert group.kills == 1
        assert group.peak_bytes <= 48 * MIB
    assert not group.folder.exists()


def test_shared_memory_is_charged_to_who_touched_it_first(hierarchy: Hierarchy) -> None:
    """So a window costs its daemon, and its readers nothing."""
    window = Path(f"/dev/shm/csd-test-{os.getpid()}")
    window.write_bytes(bytes(64 * MIB))
    try:
        with Cgroup.made(hierarchy, "-reader") as group:
            group.limit(48 * MIB)
            code = f"f = open('{window}', 'rb'); b = bytearray({MIB})\nwhile f.readinto(b): pass"
            assert run_in(group, code) == 0
            assert group.peak_bytes < 48 * MIB
    finally:
        window.unlink()


def test_what_a_killed_process_left_is_removed_by_the_next(hierarchy: Hierarchy) -> None:
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert maker.stdout is not None
    left = Path(maker.stdout.readline().strip())
    maker.kill()
    maker.communicate()
    assert left.is_dir()
    with Cgroup.made(hierarchy, "-next"):
        assert not left.exists()


def test_a_process_outside_of_the_group_it_should_be_in_is_refused(
    hierarchy: Hierarchy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CSD_CGROUP", "/sys/fs/cgroup/elsewhere")
    with pytest.raises(NoCgroup, match="should be in /sys/fs/cgroup/elsewhere"):
        Cgroup.entered(hierarchy)


# ---- hierarchies that are not there: plain folders stand for them -----------------------------


def proc(tmp_path: Path, mount: str, own: str) -> Path:
    folder = tmp_path / "proc"
    folder.mkdir()
    (folder / "mountinfo").write_text(f"24 1 0:22 / /proc rw - proc proc rw\n{mount}\n")
    (folder / "cgroup").write_text(own)
    return folder


def version_2(tmp_path: Path) -> Path:
    mount = tmp_path / "cgroup"
    (mount / "user" / "session").mkdir(parents=True)
    (mount / "cgroup.controllers").write_text("cpu memory\n")
    line = f"30 24 0:26 / {mount} rw shared:4 - cgroup2 cgroup2 rw,nsdelegate"
    return proc(tmp_path, line, "0::/user/session\n")


def test_version_2_is_found_with_the_groups_above(tmp_path: Path) -> None:
    found = Hierarchy.find(version_2(tmp_path))
    mount = tmp_path / "cgroup"
    assert list(found.parents()) == [mount / "user/session", mount / "user", mount]


def test_version_1_in_a_container_is_found_below_its_mount(tmp_path: Path) -> None:
    line = "30 24 0:26 /docker/1 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
    own = "9:cpu:/docker/1\n4:memory:/docker/1/inner\n"
    found = Hierarchy.find(proc(tmp_path, line, own))
    assert found.own == Path("/sys/fs/cgroup/memory/inner")


def test_where_nothing_is_mounted_the_message_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NoCgroup, match=r"no cgroup filesystem .* systemd-run --user --scope"):
        Hierarchy.find(proc(tmp_path, "29 24 0:25 / /sys rw - sysfs sysfs rw", "0::/\n"))


def test_where_no_group_limits_memory_each_reason_is_named(tmp_path: Path) -> None:
    found = Hierarchy.find(version_2(tmp_path))
    mount = tmp_path / "cgroup"
    for folder in (mount, mount / "user", mount / "user" / "session"):
        (folder / "cgroup.subtree_control").mkdir()  # cannot be written
    with (
        pytest.raises(NoCgroup, match=r"session: its memory controller is not passed on: .*user: "),
        Cgroup.made(found),
    ):
        pass
    assert not list(mount.rglob(f"{PREFIX}*"))
