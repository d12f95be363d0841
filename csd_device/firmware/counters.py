"""What the drive counts over its life: the SMART page's figures."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]

DATA_UNIT_BYTES = 512 * 1000  # NVMe counts data in thousands of 512 bytes, rounded up


@dataclass(slots=True)
class Counters:
    """All since the drive was made; `*_bytes` as hosts asked for them."""

    host_read_commands: int = 0  # Read and Compare
    host_write_commands: int = 0  # Write
    nvm_commands: int = 0  # of the NVM command set, those two among them
    compute_commands: int = 0
    admin_commands: int = 0
    failed_commands: int = 0
    aborted_commands: int = 0
    read_bytes: int = 0  # by Read, Compare and Verify
    written_bytes: int = 0
    staged_bytes: int = 0
    nand_page_reads: int = 0
    media_errors: int = 0
    busy_ns: int = 0  # modelled time with at least one command under way
    power_cycles: int = 0
    unsafe_shutdowns: int = 0
    warning_temp_ns: int = 0  # at or above the warning temperature, below the critical one
    critical_temp_ns: int = 0
    power_on_ns: int = 0  # before this power-on; a report adds what has passed since
    nand_written_bytes: int = 0  # before this power-on, as above

    @classmethod
    def restore(cls, saved: dict[str, Any]) -> Self:
        """What `saved` says of the counters that there are. Raises ValueError for no number."""
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in saved.items() if name in known}
        for name, value in values.items():
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} = {value!r} is no count")
        return cls(**values)

    def now(self, power_on_ns: int, nand_written_bytes: int) -> "Counters":
        """A copy with what was added since power-on, for a report or to be saved."""
        return replace(
            self,
            power_on_ns=self.power_on_ns + power_on_ns,
            nand_written_bytes=self.nand_written_bytes + nand_written_bytes,
        )

    def as_object(self) -> dict[str, int]:
        return asdict(self)

    @property
    def data_units_read(self) -> int:
        """Data read: by commands that read blocks, and what was staged."""
        return -(-(self.read_bytes + self.staged_bytes) // DATA_UNIT_BYTES)

    @property
    def data_units_written(self) -> int:
        return -(-self.written_bytes // DATA_UNIT_BYTES)


class BusyTime:
    """The union of spans in which something was under way. Spans start in ascending order."""

    __slots__ = ("until_ns",)

    def __init__(self) -> None:
        self.until_ns = 0

    def add(self, start_ns: int, end_ns: int) -> int:
        """How much of this span no earlier one covers."""
        if end_ns <= self.until_ns:
            return 0
        fresh_ns = end_ns - max(start_ns, self.until_ns)
        self.until_ns = end_ns
        return fresh_ns

    def add_all(self, start_ns: I64, end_ns: I64) -> int:
        """The same for many spans [n], one after the other."""
        if not start_ns.size:
            return 0
        before = np.empty_like(end_ns)
        before[0] = self.until_ns
        np.maximum.accumulate(end_ns[:-1], out=before[1:])
        np.maximum(before[1:], self.until_ns, out=before[1:])
        self.until_ns = max(self.until_ns, int(end_ns.max()))
        return int(np.maximum(end_ns - np.maximum(start_ns, before), 0).sum())
