"""The FTL against a dictionary, with restarts and power loss; torn journals; `kill -9`."""

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from csd_device.config import DriveConfig, load_config
from csd_device.errors import CapacityExceeded
from csd_device.ftl import Ftl, journal, translation
from csd_device.ftl.changes import Changes
from csd_device.ftl.checkpoint import Progress
from csd_device.ftl.folder import MediaFolder
from csd_device.nand import FileMedia
from csd_device.nand.media import U8

SECTOR = 4096
SPACE = 96  # logical sectors the tests use
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # so that a sync costs nothing


def _config() -> DriveConfig:
    """24 superblocks of 8 pages of 4 sectors: 3 MiB of NAND, 2 MiB for the host."""
    tiny = load_config("tiny")
    geometry = tiny.geometry.model_copy(
        update={
            "channels": 2,
            "dies_per_channel": 1,
            "planes_per_die": 2,
            "blocks_per_plane": 24,
            "pages_per_block": 2,
        }
    )
    return tiny.model_copy(update={"geometry": geometry})


CONFIG = _config()


@pytest.fixture
def memory_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ftl-", dir=MEMORY) as folder:
        yield Path(folder)


def _sectors(stamp: int, count: int) -> bytes:
    """Sectors that name the write they came from, every eight bytes."""
    return np.full(count * SECTOR // 8, stamp, np.uint64).tobytes()


def _stamps(ftl: Ftl) -> tuple[int, ...]:
    """The stamp of each sector; asserts that no sector is a mix."""
    out = np.empty(SPACE * SECTOR, np.uint8)
    ftl.read(0, out)
    words = out.view(np.uint64).reshape(SPACE, -1)
    assert (words == words[:, :1]).all()
    return tuple(words[:, 0].tolist())


def _cut_power(ftl: Ftl) -> None:
    """What a kill leaves: files closed, nothing flushed, the lock gone."""
    ftl._journal.close()
    ftl._media.close()
    ftl._folder.close()


class FtlAgainstDict(RuleBasedStateMachine):
    """`history[-1]` is what a read gives now; a crash may give any state since the last flush."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="ftl-", dir=MEMORY))
        self.ftl = Ftl.open(self.folder / "d", CONFIG)
        self.history: list[tuple[int, ...]] = [(0,) * SPACE]
        self.stamp = 0

    def _now(self, lpn: int, count: int, stamp: int) -> None:
        last = self.history[-1]
        self.history.append(last[:lpn] + (stamp,) * count + last[lpn + count :])

    @rule(lpn=st.integers(0, SPACE - 1), count=st.integers(1, 40), fua=st.booleans())
    def write(self, lpn: int, count: int, fua: bool) -> None:
        count = min(count, SPACE - lpn)
        self.stamp += 1
        try:
            self.ftl.write(lpn, _sectors(self.stamp, count), fua=fua)
        except CapacityExceeded:
            return
        self._now(lpn, count, self.stamp)
        if fua:
            del self.history[:-1]

    @rule(lpn=st.integers(0, SPACE - 1), count=st.integers(1, SPACE))
    def deallocate(self, lpn: int, count: int) -> None:
        count = min(count, SPACE - lpn)
        self.ftl.deallocate(lpn, count)
        self._now(lpn, count, 0)

    @rule()
    def deallocate_all(self) -> None:
        self.ftl.deallocate_all()
        self._now(0, SPACE, 0)

    @rule()
    def flush(self) -> None:
        self.ftl.flush()
        del self.history[:-1]

    @rule()
    def restart(self) -> None:
        self.ftl.close()
        self.ftl = Ftl.open(self.folder / "d", CONFIG)
        del self.history[:-1]

    @rule()
    def lose_power(self) -> None:
        _cut_power(self.ftl)
        self.ftl = Ftl.open(self.folder / "d", CONFIG)
        found = _stamps(self.ftl)
        assert found in self.history
        self.history = [found]

    @precondition(lambda self: self.ftl._journal.size_bytes > 0)
    @rule(lost=st.integers(1, 60))
    def tear_the_last_record(self, lost: int) -> None:
        """Power goes while the record of a flush is being written."""
        size = self.ftl._journal.size_bytes
        self.ftl._take_back = lambda: None  # what follows the record does not happen
        self.ftl.flush()
        grown = self.ftl._journal.size_bytes - size
        _cut_power(self.ftl)
        if grown > 0:
            path = self.folder / "d" / journal.JOURNAL_NAME
            path.write_bytes(path.read_bytes()[: -min(lost, grown)])
        self.ftl = Ftl.open(self.folder / "d", CONFIG)
        found = _stamps(self.ftl)
        assert found in self.history
        self.history = [found]

    @invariant()
    def reads_what_was_written(self) -> None:
        assert _stamps(self.ftl) == self.history[-1]
        assert self.ftl.used_sectors == sum(stamp != 0 for stamp in self.history[-1])

    def teardown(self) -> None:
        self.ftl.close()
        shutil.rmtree(self.folder)


FtlAgainstDict.TestCase.settings = settings(
    max_examples=50, stateful_step_count=40, deadline=None, derandomize=True
)
TestFtlAgainstDict = FtlAgainstDict.TestCase


def test_a_journal_cut_at_any_byte_is_one_of_the_flushed_states(memory_path: Path) -> None:
    ftl = Ftl.open(memory_path / "d", CONFIG)
    states, ends = [_stamps(ftl)], [0]
    for stamp in range(1, 6):
        ftl.write(stamp * 7, _sectors(stamp, 12))
        ftl.deallocate(stamp, 2)
        ftl.flush()
        states.append(_stamps(ftl))
        ends.append(ftl._journal.size_bytes)
    _cut_power(ftl)
    path = memory_path / "d" / journal.JOURNAL_NAME
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        ftl = Ftl.open(memory_path / "d", CONFIG)
        flushed = sum(end <= cut for end in ends) - 1
        assert _stamps(ftl) == states[flushed], cut
        assert ftl._journal.size_bytes == ends[flushed]
        _cut_power(ftl)


def test_a_damaged_record_ends_the_journal_and_appending_goes_on(memory_path: Path) -> None:
    ftl = Ftl.open(memory_path / "d", CONFIG)
    for stamp in (1, 2):
        ftl.write(0, _sectors(stamp, 4), fua=True)
    _cut_power(ftl)
    path = memory_path / "d" / journal.JOURNAL_NAME
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x10
    path.write_bytes(data)
    ftl = Ftl.open(memory_path / "d", CONFIG)
    assert _stamps(ftl)[:4] == (1,) * 4
    ftl.write(8, _sectors(3, 1), fua=True)
    _cut_power(ftl)
    ftl = Ftl.open(memory_path / "d", CONFIG)
    assert _stamps(ftl)[:9] == (1,) * 4 + (0,) * 4 + (3,)
    ftl.close()


def test_records_that_the_checkpoint_contains_are_not_replayed(memory_path: Path) -> None:
    ftl = Ftl.open(memory_path / "d", CONFIG)
    ftl.write(0, _sectors(1, 8), fua=True)
    path = memory_path / "d" / journal.JOURNAL_NAME
    old = path.read_bytes()
    ftl.deallocate(0, 8)
    ftl.close()  # checkpoint; a crash here could have left the journal
    path.write_bytes(old)
    ftl = Ftl.open(memory_path / "d", CONFIG)
    assert not any(_stamps(ftl))
    ftl.write(0, _sectors(2, 1), fua=True)
    _cut_power(ftl)
    ftl = Ftl.open(memory_path / "d", CONFIG)
    assert _stamps(ftl)[:2] == (2, 0)
    ftl.close()


def test_a_long_journal_becomes_a_checkpoint(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(translation, "CHECKPOINT_BYTES", 2000)
    ftl = Ftl.open(memory_path / "d", CONFIG)
    for stamp in range(1, 200):
        ftl.write(stamp % SPACE, _sectors(stamp, 1), fua=True)
        assert ftl._journal.size_bytes <= 2000
    expected = _stamps(ftl)
    _cut_power(ftl)
    ftl = Ftl.open(memory_path / "d", CONFIG)
    assert _stamps(ftl) == expected
    ftl.close()


_CHILD = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
import test_ftl_recovery as room
ftl = room.Ftl.open(Path(sys.argv[1]), room.CONFIG)
stamp = 0
while True:
    stamp += 1
    ftl.write(0, room._sectors(stamp, room.SPACE))
    if stamp % 3 == 0:
        ftl.flush()
        print(stamp, flush=True)
"""


@pytest.mark.parametrize("acknowledged", [1, 7, 40])
def test_kill_9_keeps_what_was_flushed(memory_path: Path, acknowledged: int) -> None:
    """Each write covers all sectors, so after the kill they all name one write, not older than
    the last flush that was acknowledged."""
    command = [sys.executable, "-c", _CHILD.format(here=str(Path(__file__).parent))]
    child = subprocess.Popen([*command, str(memory_path / "d")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    flushed = 0
    for _ in range(acknowledged):
        flushed = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    child.wait()
    flushed = max([flushed, *(int(line) for line in child.stdout.read().split("\n")[:-1])])
    child.stdout.close()
    ftl = Ftl.open(memory_path / "d", CONFIG)
    stamps = _stamps(ftl)
    assert len(set(stamps)) == 1
    assert stamps[0] >= flushed
    ftl.close()


class _PowerCut(Exception):
    """The drive is off."""


class _Supply:
    """Goes off at the n-th step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise _PowerCut


class _CutMedia(FileMedia):
    """Every change is two steps: half a write may be all that happens."""

    supply = _Supply(1 << 30)

    def write(self, start: int, data: U8) -> None:
        self.supply.step()
        super().write(start, data[: data.size // 2])
        self.supply.step()
        super().write(start, data)

    def erase(self, start: int, length: int) -> None:
        self.supply.step()
        super().erase(start, length)
        self.supply.step()


def _open_on(path: Path, supply: _Supply) -> Ftl:
    folder = MediaFolder.open(path, CONFIG)
    media = _CutMedia(folder.nand_path, CONFIG.geometry.raw_bytes)
    media.supply = supply
    ftl = Ftl(media, CONFIG, folder)
    append = ftl._journal.append

    def cut_append(changes: Changes, progress: Progress) -> None:
        supply.step()
        append(changes, progress)
        supply.step()

    ftl._journal.append = cut_append
    return ftl


def _run_until_cut(ftl: Ftl, history: list[tuple[int, ...]], seed: int) -> None:
    """Random changes; `history` has the states since the last flush, the one asked for included."""
    rng = np.random.default_rng(seed)
    for stamp in range(1, 41):
        lpn = int(rng.integers(0, SPACE // 2))
        count = int(rng.integers(1, SPACE - lpn))
        now = history[-1]
        history.append(now[:lpn] + (stamp,) * count + now[lpn + count :])
        ftl.write(lpn, _sectors(stamp, count))
        if rng.random() < 0.4:
            ftl.flush()
            del history[:-1]


@pytest.mark.parametrize("seed", range(2))
def test_power_cut_at_any_step_leaves_a_state_since_the_last_flush(
    memory_path: Path, seed: int
) -> None:
    steps = 0
    while True:
        path = memory_path / str(steps)
        ftl = _open_on(path, _Supply(steps))
        history = [(0,) * SPACE]
        try:
            _run_until_cut(ftl, history, seed)
        except _PowerCut:
            _cut_power(ftl)
        else:
            _cut_power(ftl)
            break
        ftl = Ftl.open(path, CONFIG)
        assert _stamps(ftl) in history, f"seed {seed}, cut at step {steps}"
        _cut_power(ftl)
        shutil.rmtree(path)
        steps += 3
    assert steps > 100


def test_power_losses_lose_no_superblock_and_no_wear(memory_path: Path) -> None:
    for stamp in range(1, 60):
        ftl = Ftl.open(memory_path / "d", CONFIG)
        ftl.write(0, _sectors(stamp, SPACE))
        ftl.flush()
        ftl.flush()
        before = ftl.counters()
        _cut_power(ftl)
    ftl = Ftl.open(memory_path / "d", CONFIG)
    ftl.flush()
    after = ftl.counters()
    assert (after.erases_max, after.erases_mean) == (before.erases_max, before.erases_mean)
    assert after.erases_mean > 1
    ftl.close()
