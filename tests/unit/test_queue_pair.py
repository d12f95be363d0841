"""The host's queue pair over a scripted lane: what it does when things go right, late or wrong."""

import threading
from collections.abc import Callable

import pytest

from csd_protocol.csd.v1 import csd_pb2 as pb
from csd_protocol.status import Status
from host_client.driver import entries
from host_client.driver.errors import CommandFailed, DriveLost, DriveTimeout, QueueFull
from host_client.driver.link import Lost, Receive
from host_client.driver.queue_pair import PendingCommand, QueuePair

Answer = Callable[[pb.SubmissionEntry], pb.CompletionEntry | None]


class ScriptedLink:
    """Answers Connect; everything else as `answer` says (None: not at all)."""

    address = "scripted"

    def __init__(self, depth: int = 4) -> None:
        self.depth = depth
        self.sent: list[pb.SubmissionEntry] = []
        self.answer: Answer = lambda entry: pb.CompletionEntry(cid=entry.cid)
        self.closed = False

    def open_lane(self, receive: Receive, lost: Lost) -> "ScriptedLink":
        self.receive, self.lost = receive, lost
        return self

    def send(self, entry: pb.SubmissionEntry) -> None:
        self.sent.append(pb.SubmissionEntry.FromString(entry.SerializeToString()))
        if entry.WhichOneof("body") == "connect":
            result = pb.ConnectResult(queue_depth=self.depth)
            self.deliver(pb.CompletionEntry(cid=entry.cid, connect=result))
        elif (completion := self.answer(entry)) is not None:
            self.deliver(completion)

    def deliver(self, completion: pb.CompletionEntry) -> None:
        """As a lane does: on a thread of its own."""
        thread = threading.Thread(target=self.receive, args=[completion])
        thread.start()
        thread.join()

    def close(self) -> None:
        self.closed = True

    def bodies(self) -> list[str | None]:
        return [entry.WhichOneof("body") for entry in self.sent]


def failed(cid: int, status: Status, dnr: bool) -> pb.CompletionEntry:
    wire = pb.Status(sct=status.sct, sc=status.sc, dnr=dnr, detail="why")
    return pb.CompletionEntry(cid=cid, status=wire)


def silent(_: pb.SubmissionEntry) -> None:
    return None


def keep_alive(queue: QueuePair, **kwargs: float) -> PendingCommand[None]:
    return queue.submit(entries.keep_alive(), entries.nothing, **kwargs)


def test_completions_out_of_order_reach_their_commands() -> None:
    link = ScriptedLink()
    link.answer = silent
    queue = QueuePair(link, "host", "id")
    first = queue.submit(entries.read(0, 1), entries.data_of)
    second = queue.submit(entries.read(1, 1), entries.data_of)
    link.deliver(pb.CompletionEntry(cid=second.cid, data=b"second"))
    assert second.done()
    assert not first.done()
    link.deliver(pb.CompletionEntry(cid=first.cid, data=b"first"))
    assert (first.result(), second.result()) == (b"first", b"second")


def test_depth_bounds_what_is_in_flight() -> None:
    link = ScriptedLink(depth=4)
    link.answer = silent
    queue = QueuePair(link, "host", "id")
    in_flight = [keep_alive(queue) for _ in range(queue.depth)]
    with pytest.raises(QueueFull, match="all 3 entries"):
        keep_alive(queue, room_timeout_s=0.0)
    link.deliver(pb.CompletionEntry(cid=in_flight[1].cid))
    again = keep_alive(queue)
    assert len({command.cid for command in (in_flight[0], in_flight[2], again)}) == 3


def test_submitting_waits_for_room() -> None:
    link = ScriptedLink(depth=2)
    link.answer = silent
    queue = QueuePair(link, "host", "id")
    first = keep_alive(queue)
    second: list[PendingCommand[None]] = []
    waiting = threading.Thread(target=lambda: second.append(keep_alive(queue)))
    waiting.start()
    link.deliver(pb.CompletionEntry(cid=first.cid))
    waiting.join()
    assert not second[0].done()


def test_failure_names_command_status_and_reason() -> None:
    link = ScriptedLink()
    link.answer = lambda entry: failed(entry.cid, Status.LBA_OUT_OF_RANGE, dnr=True)
    queue = QueuePair(link, "host", "id")
    with pytest.raises(
        CommandFailed, match=r"Read of 1 blocks .* LBA Out of Range \(0/80h\): why"
    ) as e:
        queue.submit(entries.read(9, 1), entries.data_of).result()
    assert e.value.status is Status.LBA_OUT_OF_RANGE
    assert not e.value.retryable


def test_unknown_status_is_shown_by_its_numbers() -> None:
    link = ScriptedLink()
    link.answer = lambda entry: pb.CompletionEntry(
        cid=entry.cid, status=pb.Status(sct=7, sc=0xFE, dnr=True)
    )
    with pytest.raises(CommandFailed, match="status 7/FEh") as error:
        keep_alive(QueuePair(link, "host", "id")).result()
    assert error.value.status is None


def test_retryable_failure_is_sent_again() -> None:
    link = ScriptedLink()
    statuses = [Status.WINDOW_FULL, Status.WINDOW_FULL]

    def answer(entry: pb.SubmissionEntry) -> pb.CompletionEntry:
        if statuses:
            return failed(entry.cid, statuses.pop(), dnr=False)
        return pb.CompletionEntry(cid=entry.cid, data=b"at last")

    link.answer = answer
    queue = QueuePair(link, "host", "id")
    assert queue.submit(entries.read(0, 1), entries.data_of).result() == b"at last"
    assert link.bodies().count("blocks") == 3


def test_retries_are_bounded() -> None:
    link = ScriptedLink()
    link.answer = lambda entry: failed(entry.cid, Status.WINDOW_FULL, dnr=False)
    queue = QueuePair(link, "host", "id")
    with pytest.raises(CommandFailed, match="Window Full") as error:
        queue.submit(entries.read(0, 1), entries.data_of).result()
    assert error.value.retryable
    assert link.bodies().count("blocks") == 5


def test_do_not_retry_is_obeyed() -> None:
    link = ScriptedLink()
    link.answer = lambda entry: failed(entry.cid, Status.WINDOW_FULL, dnr=True)
    with pytest.raises(CommandFailed):
        keep_alive(QueuePair(link, "host", "id")).result()
    assert link.bodies().count("keep_alive") == 1


def test_timeout_asks_for_an_abort_and_frees_the_entry_with_the_late_completion() -> None:
    link = ScriptedLink(depth=2)
    link.answer = silent
    queue = QueuePair(link, "host", "id")
    late = keep_alive(queue)
    with pytest.raises(DriveTimeout, match=r"Keep Alive: not completed .* within 0 s"):
        late.result(timeout_s=0.0)
    assert link.sent[-1].abort.cid == late.cid
    link.deliver(failed(late.cid, Status.ABORT_REQUESTED, dnr=False))
    assert link.bodies().count("keep_alive") == 1  # given up: not retried
    keep_alive(queue, room_timeout_s=0.0)


def test_leases_of_an_abandoned_command_are_released() -> None:
    link = ScriptedLink()
    link.answer = silent
    queue = QueuePair(link, "host", "id")
    late = queue.submit(entries.stage(0, []), entries.staged_of)
    with pytest.raises(DriveTimeout):
        late.result(timeout_s=0.0)
    staged = pb.StageResult(sites=[pb.StagedSite(lease=7), pb.StagedSite(), pb.StagedSite(lease=9)])
    link.deliver(pb.CompletionEntry(cid=late.cid, stage=staged))
    assert list(link.sent[-1].release.leases) == [7, 9]


def test_a_lost_drive_fails_everything_at_once() -> None:
    link = ScriptedLink(depth=3)
    link.answer = silent
    queue = QueuePair(link, "host", "id")
    pending = [keep_alive(queue) for _ in range(queue.depth)]
    refused: list[Exception] = []

    def submit_more() -> None:
        try:
            keep_alive(queue).result()
        except DriveLost as error:
            refused.append(error)

    waiting = threading.Thread(target=submit_more)
    waiting.start()
    link.lost("UNAVAILABLE: Socket closed")
    waiting.join()
    assert len(refused) == 1
    for command in pending:
        with pytest.raises(DriveLost, match="drive at scripted is gone: UNAVAILABLE"):
            command.result()
    with pytest.raises(DriveLost):
        keep_alive(queue)


def test_callbacks_run_once_whenever_added() -> None:
    link = ScriptedLink()
    link.answer = silent
    queue = QueuePair(link, "host", "id")
    pending = keep_alive(queue)
    called: list[bool] = []
    pending.add_done_callback(lambda command: called.append(command.done()))
    assert called == []
    link.deliver(pb.CompletionEntry(cid=pending.cid))
    pending.add_done_callback(lambda command: called.append(command.done()))
    assert called == [True, True]


def test_a_callback_never_waits_for_room() -> None:
    link = ScriptedLink(depth=2)
    link.answer = silent
    queue = QueuePair(link, "host", "id")
    pending = keep_alive(queue)
    seen: list[str] = []

    def submit_twice(_: PendingCommand[None]) -> None:
        keep_alive(queue)
        try:
            keep_alive(queue)
        except QueueFull:
            seen.append("full")

    pending.add_done_callback(submit_twice)
    link.deliver(pb.CompletionEntry(cid=pending.cid))
    assert seen == ["full"]


def test_completion_of_an_unknown_cid_disturbs_nothing() -> None:
    link = ScriptedLink()
    queue = QueuePair(link, "host", "id")
    link.deliver(pb.CompletionEntry(cid=999))
    keep_alive(queue).result()


def test_refused_connection_closes_the_lane() -> None:
    link = ScriptedLink()

    def refuse(entry: pb.SubmissionEntry) -> None:
        link.deliver(failed(entry.cid, Status.PROTOCOL_VERSION, dnr=True))

    link.send = refuse  # type: ignore[method-assign]
    with pytest.raises(CommandFailed, match="Protocol Version Not Supported"):
        QueuePair(link, "host", "id")
    assert link.closed
