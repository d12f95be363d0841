"""The budget of on-drive DRAM, by name."""

from dataclasses import dataclass

from csd_device.errors import DramExceeded


@dataclass(frozen=True, slots=True)
class Allotment:
    """A named share of on-drive DRAM."""

    name: str
    size_bytes: int


class Arena:
    """Keeps the sum of all allotments within `total_bytes`; holds no memory itself."""

    def __init__(self, total_bytes: int) -> None:
        assert total_bytes > 0
        self.total_bytes = total_bytes
        self._sizes: dict[str, int] = {}

    @property
    def used_bytes(self) -> int:
        return sum(self._sizes.values())

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.used_bytes

    def allot(self, name: str, size_bytes: int) -> Allotment:
        """A share of this name, which must not exist yet. Raises DramExceeded with figures."""
        assert name not in self._sizes, name
        return self._set(name, size_bytes)

    def resize(self, name: str, size_bytes: int) -> Allotment:
        """Changes a share that exists. Raises DramExceeded; the share then stays as it was."""
        assert name in self._sizes, name
        return self._set(name, size_bytes)

    def free(self, name: str) -> None:
        """Gives the share back."""
        del self._sizes[name]

    def report(self) -> dict[str, int]:
        """Bytes of each allotment by name, then `free` and `total`."""
        return {**self._sizes, "free": self.free_bytes, "total": self.total_bytes}

    def _set(self, name: str, size_bytes: int) -> Allotment:
        assert size_bytes >= 0
        available = self.free_bytes + self._sizes.get(name, 0)
        if size_bytes > available:
            raise DramExceeded(name, size_bytes, available, self.total_bytes)
        self._sizes[name] = size_bytes
        return Allotment(name, size_bytes)
