"""A bare gRPC server with one bidirectional stream: each message gets an answer of a set size.

`python -m benchmarks.echo_server SOCKET BYTES` runs it as a process of its own, as a drive's daemon
is; it ends with its standard input.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

METHOD = "/bench.Echo/Stream"


class _Echo(grpc.GenericRpcHandler):
    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def service(
        self, details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        if details.method != METHOD:
            return None
        return grpc.stream_stream_rpc_method_handler(self._stream)

    def _stream(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in requests:
            yield self._answer


def serve(socket: str, answer_bytes: int) -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((_Echo(bytes(answer_bytes)),))
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    sys.stdin.read()
    server.stop(None)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
