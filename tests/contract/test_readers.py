"""What every reader promises, run over each kind; then what is particular to one."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from host_client.io import (
    Buffer,
    EndOfFile,
    Extent,
    Reader,
    ReaderUnavailable,
    ReadFailed,
    WindowMissing,
    open_reader,
)

FILE_BYTES = (5 << 20) + 123
KINDS = ["io_uring", "threads"]


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, FILE_BYTES, np.uint8)


@pytest.fixture(scope="module")
def path(data: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("window") / "window"
    file.write_bytes(data.tobytes())
    return file


def open_or_skip(path: Path, kind: str) -> Reader:
    try:
        return open_reader(path, kind)  # type: ignore[arg-type]
    except ReaderUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reader(kind: str, path: Path) -> Iterator[Reader]:
    with open_or_skip(path, kind) as opened:
        yield opened


def assert_holds(buffer: Buffer, at: int, data: np.ndarray, offset: int, length: int) -> None:
    np.testing.assert_array_equal(
        buffer.array[at : at + length], data[offset : offset + length], strict=True
    )


# ---- the contract ----------------------------------------------------------------------------


def test_it_says_its_kind_and_its_file(reader: Reader, kind: str, path: Path) -> None:
    assert (reader.name, reader.path) == (kind, path)


@pytest.mark.parametrize("offset", [0, 1, 4096, 1_000_003])
@pytest.mark.parametrize("length", [1, 4095, 1 << 20, (3 << 20) + 17])
def test_a_range_arrives_whole(reader: Reader, data: np.ndarray, offset: int, length: int) -> None:
    buffer = Buffer(length + 64)
    reader.read([Extent(offset, length, buffer, 64)])
    assert_holds(buffer, 64, data, offset, length)
    assert not buffer.array[:64].any()


def test_the_last_byte_can_be_read(reader: Reader, data: np.ndarray) -> None:
    buffer = Buffer(FILE_BYTES)
    reader.read([Extent(0, FILE_BYTES, buffer)])
    assert_holds(buffer, 0, data, 0, FILE_BYTES)


def test_many_tickets_are_under_way_and_waited_for_in_any_order(
    reader: Reader, data: np.ndarray
) -> None:
    random = np.random.default_rng(9)
    jobs = []
    for _ in range(40):
        length = int(random.integers(1, 400_000))
        offset = int(random.integers(0, FILE_BYTES - length))
        buffer = Buffer(length)
        jobs.append((reader.submit([Extent(offset, length, buffer)]), buffer, offset, length))
    for position in random.permutation(len(jobs)):
        ticket, buffer, offset, length = jobs[position]
        reader.wait(ticket)
        assert_holds(buffer, 0, data, offset, length)


def test_one_ticket_fills_several_buffers_and_several_places(
    reader: Reader, data: np.ndarray
) -> None:
    first, second = Buffer(1 << 20), Buffer(2 << 20)
    extents = [
        Extent(10, 1000, first, 5),
        Extent(3 << 20, 2 << 20, second),
        Extent(0, 0, first),
        Extent(77, 4096, first, 8192),
    ]
    reader.read(extents)
    for extent in extents:
        assert_holds(extent.buffer, extent.buffer_offset, data, extent.offset, extent.length)


def test_nothing_to_read_is_done_at_once(reader: Reader) -> None:
    reader.read([])
    reader.read([Extent(0, 0, Buffer(0))])


def test_what_was_written_after_opening_is_seen(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "window"
    file.write_bytes(bytes(8192))
    buffer = Buffer(4)
    with open_or_skip(file, kind) as reader, file.open("r+b") as writer:
        writer.write(b"unit")
        writer.flush()
        reader.read([Extent(0, 4, buffer)])
    assert bytes(buffer.array) == b"unit"


def test_reading_past_the_end_names_file_offset_and_size(
    reader: Reader, path: Path, data: np.ndarray
) -> None:
    buffer = Buffer(4096)
    with pytest.raises(EndOfFile, match=f"{path}.*ends at {FILE_BYTES} bytes") as caught:
        reader.read([Extent(FILE_BYTES - 100, 4096, buffer)])
    assert (caught.value.offset, caught.value.length) == (FILE_BYTES, 3996)
    reader.read([Extent(0, 4096, buffer)])  # the reader is as good as before
    assert_holds(buffer, 0, data, 0, 4096)


def test_one_bad_extent_fails_its_ticket_and_no_other(reader: Reader, data: np.ndarray) -> None:
    good, bad = Buffer(3 << 20), Buffer(3 << 20)
    tickets = [
        reader.submit([Extent(0, 1 << 20, bad), Extent(FILE_BYTES, 2 << 20, bad, 1 << 20)]),
        reader.submit([Extent(0, 3 << 20, good)]),
    ]
    with pytest.raises(EndOfFile):
        reader.wait(tickets[0])
    reader.wait(tickets[1])
    assert_holds(good, 0, data, 0, 3 << 20)
    assert_holds(bad, 0, data, 0, 1 << 20)


def test_an_error_of_the_kernel_is_named(kind: str, tmp_path: Path) -> None:
    with open_or_skip(tmp_path, kind) as reader:
        with pytest.raises(ReadFailed, match="offset 8192 failed: Is a directory") as caught:
            reader.read([Extent(8192, 10, Buffer(10))])
        assert caught.value.path == tmp_path


@pytest.mark.parametrize(
    "offset,length,at", [(-1, 1, 0), (0, -1, 0), (0, 11, 0), (0, 10, 1), (0, 1, -1), (0, 1, 11)]
)
def test_an_extent_that_does_not_fit_starts_nothing(
    reader: Reader, offset: int, length: int, at: int
) -> None:
    first, second = Buffer(10), Buffer(10)
    with pytest.raises(ValueError, match="do not fit a buffer"):
        reader.submit([Extent(0, 10, first), Extent(offset, length, second, at)])
    reader.read([])
    assert not first.array.any()


def test_a_ticket_is_waited_for_once(reader: Reader) -> None:
    ticket = reader.submit([Extent(0, 10, Buffer(10))])
    reader.wait(ticket)
    with pytest.raises(ValueError, match="not under way"):
        reader.wait(ticket)


def test_closing_lets_reads_finish_and_may_be_repeated(kind: str, path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    reader = open_or_skip(path, kind)
    for _ in range(8):
        reader.submit([Extent(0, 4 << 20, Buffer(4 << 20))])
    reader.close()
    reader.close()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_window_that_is_not_there_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(WindowMissing, match=r"nowhere.*No such file.*run both on one machine"):
        open_reader(tmp_path / "nowhere", kind)  # type: ignore[arg-type]


def test_short_reads_are_completed(
    kind: str, path: Path, data: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_reads_short(monkeypatch)
    buffer = Buffer(2 << 20)
    with open_or_skip(path, kind) as reader:
        reader.read([Extent(12_345, 2 << 20, buffer)])
    assert_holds(buffer, 0, data, 12_345, 2 << 20)


def make_reads_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read of more than one page brings two thirds of what was asked for."""
    from host_client.io import uring_reader

    def shortened(length: int) -> int:
        return length if length <= 4096 else length * 2 // 3

    class ShortRing(uring_reader.Ring):
        def prepare_read(self, fd: int, offset: int, address: int, length: int, tag: int) -> None:
            super().prepare_read(fd, offset, address, shortened(length), tag)

    preadv = os.preadv

    def short_preadv(fd: int, memory: list[memoryview], offset: int) -> int:
        return preadv(fd, [memory[0][: shortened(len(memory[0]))]], offset)

    monkeypatch.setattr(uring_reader, "Ring", ShortRing)
    monkeypatch.setattr(os, "preadv", short_preadv)


# ---- io_uring's own --------------------------------------------------------------------------


def test_waiting_for_the_ring_lets_other_threads_run() -> None:
    """The completion is produced by a Python thread: were the GIL held, it would never come."""
    from host_client.io.ring import Arrival, Ring

    try:
        ring = Ring(4)
    except ReaderUnavailable as error:
        pytest.skip(str(error))
    source = os.eventfd(0)
    target = Buffer(8)
    ring.prepare_read(source, 0, target.address, 8, 99)
    ring.submit()
    writer = threading.Thread(target=os.eventfd_write, args=(source, 7))
    writer.start()
    assert ring.wait() == [Arrival(99, 8, 0)]
    writer.join()
    assert target.array.view(np.uint64)[0] == 7
    ring.close()
    os.close(source)


def test_a_busy_kernel_is_asked_again(
    path: Path, data: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from host_client.io import uring_reader
    from host_client.io.ring import Arrival

    class BusyRing(uring_reader.Ring):
        refusals = 3

        def wait(self) -> list[Arrival]:
            arrivals = super().wait()
            if self.refusals and arrivals[0].errno == 0 and arrivals[0].tag < 100:
                self.refusals -= 1
                arrivals[0] = Arrival(arrivals[0].tag, 0, errno.EAGAIN)
            return arrivals

    monkeypatch.setattr(uring_reader, "Ring", BusyRing)
    buffer = Buffer(4096)
    with open_or_skip(path, "io_uring") as reader:
        reader.read([Extent(50, 4096, buffer)])
    assert_holds(buffer, 0, data, 50, 4096)


# ---- which kind is taken ---------------------------------------------------------------------


def refuse_rings(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    import liburing

    def refuse(entries: int, ring: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(liburing, "io_uring_queue_init", refuse)


@pytest.mark.parametrize("number,hint", [(1, "EPERM.*seccomp"), (38, "ENOSYS.*has none")])
def test_where_io_uring_is_refused_threads_read_and_say_why(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    refuse_rings(monkeypatch, number)
    with open_reader(path) as reader:
        assert reader.name == "threads"
        with pytest.raises(ReaderUnavailable, match=hint):
            open_reader(path, "io_uring")
        assert "io_uring cannot be used here" in reader.fallback_reason


def test_without_liburing_threads_read_and_say_why(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with open_reader(path) as reader:
        assert (reader.name, reader.fallback_reason) == (
            "threads",
            "io_uring cannot be used here (package liburing is not installed)",
        )


def test_threads_can_be_asked_for(path: Path) -> None:
    with open_reader(path, "threads") as reader:
        assert (reader.name, reader.fallback_reason) == ("threads", "threads were asked for")


# ---- buffers ---------------------------------------------------------------------------------


def test_views_of_a_buffer_share_its_memory() -> None:
    buffer = Buffer(4096)
    buffer.array[:2] = (0x00, 0x3C)  # 1.0 as an IEEE half, little endian
    assert buffer.array.view(np.float16)[0] == 1.0
    assert torch.from_numpy(buffer.array).data_ptr() == buffer.address
    assert buffer.address % 4096 == 0


def test_a_buffer_of_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 bytes"):
        Buffer(-1)
