"""Drive addresses as people write them."""

from pathlib import Path

import pytest

from csd_protocol.address import TcpAddress, UnixAddress, parse_address


@pytest.mark.parametrize(
    "text, address",
    [
        ("unix:/run/csd.sock", UnixAddress(Path("/run/csd.sock"))),
        ("localhost:50051", TcpAddress("localhost", 50051)),
        ("tcp:10.0.0.1:80", TcpAddress("10.0.0.1", 80)),
        ("[::1]:5000", TcpAddress("::1", 5000)),
    ],
)
def test_forms(text: str, address: object) -> None:
    parsed = parse_address(text)
    assert parsed == address
    assert parse_address(str(parsed)) == address


def test_relative_socket_becomes_absolute() -> None:
    assert parse_address("unix:csd.sock") == UnixAddress(Path.cwd() / "csd.sock")


@pytest.mark.parametrize("text", ["", "csd.sock", ":50051", "host:", "host:http", "host:65536"])
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match="unix:PATH or HOST:PORT"):
        parse_address(text)


def test_long_socket_path_is_refused_with_its_length() -> None:
    with pytest.raises(ValueError, match=r"socket path of 20[0-9] bytes"):
        parse_address("unix:/" + "x" * 200)


@pytest.mark.parametrize(
    "host, loopback",
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("h", False)],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert TcpAddress(host, 1).is_loopback is loopback
