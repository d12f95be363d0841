"""What packing needs of a drive: a run of blocks. `host_client.driver.Drive` is one."""

from typing import Protocol

import numpy as np
import numpy.typing as npt


class BlockStorage(Protocol):
    """Bytes by offset. Offsets and lengths given are multiples of `block_bytes`.

    A write that returned survives the daemon's death only once a later `flush` returned.
    """

    @property
    def capacity_bytes(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    def read(self, offset_bytes: int, length_bytes: int, /) -> bytes: ...

    def write(self, offset_bytes: int, data: bytes | memoryview, /) -> None: ...

    def copy(self, from_bytes: int, to_bytes: int, length_bytes: int, /) -> None:
        """Inside the drive: nothing crosses the link. The two runs do not overlap."""
        ...

    def define_patterns(self, data: bytes, /) -> npt.NDArray[np.uint16]:
        """Numbers for these whole blocks, one each, for `write_patterns`."""
        ...

    def write_patterns(self, offset_bytes: int, numbers: npt.NDArray[np.uint16], /) -> None:
        """As `write` with the blocks of these numbers: the drive makes them, and stores none."""
        ...

    def flush(self) -> None: ...

    def deallocate(self, offset_bytes: int, length_bytes: int, /) -> None: ...
