"""The other end of `echo_server`: one stream, one message under way."""

import queue
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import grpc

from benchmarks.echo_server import METHOD

START_TIMEOUT_S = 30.0
_END = b""  # no message is empty


class Exchange(Protocol):
    def __call__(self) -> None:
        """Send one message and wait for its answer."""


@contextmanager
def echo(folder: Path, request_bytes: int, answer_bytes: int) -> Iterator[Exchange]:
    """A server process and a stream to it; yields what exchanges one message."""
    socket = folder / "echo.sock"
    command = [sys.executable, "-m", "benchmarks.echo_server", str(socket), str(answer_bytes)]
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with subprocess.Popen(command, stdin=subprocess.PIPE) as server:
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            grpc.channel_ready_future(channel).result(START_TIMEOUT_S)
            yield _exchange(channel, requests, bytes(request_bytes))
            requests.put(_END)
        server.terminate()


def _exchange(
    channel: grpc.Channel, requests: queue.SimpleQueue[bytes], request: bytes
) -> Exchange:
    stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(METHOD)
    answers = stream(iter(requests.get, _END))

    def exchange() -> None:
        requests.put(request)
        next(answers)

    return exchange
