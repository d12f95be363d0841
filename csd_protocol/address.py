"""How a drive's address is written: `unix:PATH`, `tcp:HOST:PORT` or `HOST:PORT`."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

_UNIX_PATH_BYTES_MAX = 107  # sun_path of sockaddr_un, less its terminating zero


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: Path  # absolute

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    host: str
    port: int  # 0 when listening: any free one

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


Address = UnixAddress | TcpAddress
"""`str()` of either is what gRPC takes as a target."""


def parse_address(text: str) -> Address:
    """Raises ValueError saying what an address looks like."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix":
        return _parse_unix(rest)
    host, _, port = (rest if scheme == "tcp" else text).rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is no drive address: write unix:PATH or HOST:PORT")
    return TcpAddress(host.removeprefix("[").removesuffix("]"), int(port))


def _parse_unix(rest: str) -> UnixAddress:
    if not rest:
        raise ValueError("unix: needs the path of a socket")
    path = Path(rest).expanduser().absolute()
    if len(str(path).encode()) > _UNIX_PATH_BYTES_MAX:
        raise ValueError(
            f"socket path of {len(str(path).encode())} bytes; the system allows "
            f"{_UNIX_PATH_BYTES_MAX}. Choose a shorter one: {path}"
        )
    return UnixAddress(path)
