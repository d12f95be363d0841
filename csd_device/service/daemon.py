"""The daemon: one drive behind one address, until it is told to stop.

Beside the queue pairs it serves gRPC's standard health service (for "" and "csd.v1.Controller") and
reflection.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from csd_device.drive import Drive
from csd_device.errors import DriveRefused
from csd_device.service.endpoint import Endpoint
from csd_device.service.hold import new_event_loop
from csd_device.service.metrics import serve_metrics
from csd_device.service.servicer import QueuePairServicer
from csd_protocol.address import Address, TcpAddress, UnixAddress
from csd_protocol.csd.v1 import csd_pb2 as pb
from csd_protocol.csd.v1.csd_pb2_grpc import add_ControllerServicer_to_server

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Controller"].full_name

_MESSAGE_SPARE_BYTES = 16 << 20  # besides a command's data: unit lists, program chunks
_STOP_GRACE_S = 0.2


Ready = Callable[[Address, TcpAddress | None], None]


def serve(
    drive: Drive,
    address: Address,
    metrics: TcpAddress | None,
    ready: Ready,
    stop_with_stdin: bool,
) -> None:
    """Serves until SIGTERM or SIGINT (or the end of standard input), then stops cleanly.

    `ready` is called with the address, and that of the metrics, once they answer. Raises
    DriveRefused when nothing can listen there. The drive stays the caller's to close.
    """
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(drive, address, metrics, ready, stop_with_stdin))


async def _serve(
    drive: Drive,
    address: Address,
    metrics: TcpAddress | None,
    ready: Ready,
    stop_with_stdin: bool,
) -> None:
    stop = _stop_requested(stop_with_stdin)
    server = grpc.aio.server(options=_options(drive.mdts_bytes))
    add_ControllerServicer_to_server(QueuePairServicer(Endpoint(drive)), server)
    state = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    bound = _bind(server, address)
    scraped = await serve_metrics(drive, metrics) if metrics else None
    await server.start()
    await state.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
    ready(bound, scraped.address if scraped else None)
    await stop.wait()
    if scraped:
        scraped.server.close()
    await state.enter_graceful_shutdown()
    await server.stop(_STOP_GRACE_S)


def _stop_requested(stop_with_stdin: bool) -> asyncio.Event:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if stop_with_stdin:
        loop.add_reader(sys.stdin.fileno(), _read_stdin, stop)
    return stop


def _read_stdin(stop: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        stop.set()


def _options(mdts_bytes: int) -> list[tuple[str, int]]:
    limit = mdts_bytes + _MESSAGE_SPARE_BYTES
    return [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),  # a second daemon on the same port is an error
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.bdp_probe", 0),
    ]


def _bind(server: grpc.aio.Server, address: Address) -> Address:
    """Raises DriveRefused when the address is taken or cannot be had."""
    if isinstance(address, UnixAddress):
        _check_free(address)
        address.path.parent.mkdir(parents=True, exist_ok=True)
    try:
        port = server.add_insecure_port(str(address))
    except RuntimeError as error:
        raise DriveRefused(f"cannot listen at {address}: {error}") from error
    return TcpAddress(address.host, port) if isinstance(address, TcpAddress) else address


def _check_free(address: UnixAddress) -> None:
    """gRPC takes over any socket file: that of a dead daemon is fine, a live one's is not."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(address.path))
        except OSError:
            return
    raise DriveRefused(f"cannot listen at {address}: another daemon answers there")
