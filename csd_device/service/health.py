"""`csd-device health`: asks a daemon's health service, for a container's health check.

    python -m csd_device.service.health ADDRESS     the same, without loading the drive

Ends with status 0 when the drive serves and 1 when it does not, saying which.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from csd_protocol.address import Address, parse_address

SERVICE_NAME = "csd.v1.Controller"
TIMEOUT_S = 5.0


def ask(address: Address, timeout_s: float = TIMEOUT_S) -> tuple[bool, str]:
    """Whether the drive at `address` serves, and what to say about it."""
    request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
    with grpc.insecure_channel(str(address)) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return False, f"no drive answers at {address}: {error.details()}"
    state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    serves = answer.status == health_pb2.HealthCheckResponse.SERVING
    return serves, f"the drive at {address} says {state}"


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m csd_device.service.health ADDRESS\n")
        return 2
    try:
        address = parse_address(arguments[0])
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    serves, said = ask(address)
    sys.stderr.write(f"{said}\n")
    return 0 if serves else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
