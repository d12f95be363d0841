"""Media that pass everything on: what faults, and any other decorator, start from."""

from csd_device.nand.media import U8, Media, Pieces, Retries


class PassingMedia:
    """`Media` around others."""

    def __init__(self, inner: Media) -> None:
        self.inner = inner

    @property
    def size_bytes(self) -> int:
        return self.inner.size_bytes

    def gather(self, pieces: Pieces, out: U8) -> Retries | None:
        return self.inner.gather(pieces, out)

    def write(self, start: int, data: U8) -> None:
        self.inner.write(start, data)

    def erase(self, start: int, length: int) -> None:
        self.inner.erase(start, length)

    def sync(self) -> None:
        self.inner.sync()

    def close(self) -> None:
        self.inner.close()
