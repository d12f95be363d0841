"""Media whose decorators change while they are in use."""

from csd_device.nand.media import Media, direct_copy


class MediaSwitch:
    """Media that stand for others. Their methods are its own, so passing them on costs nothing."""

    def __init__(self, clean: Media) -> None:
        self.clean = clean
        self.size_bytes = clean.size_bytes
        self.put(clean)

    def put(self, media: Media) -> None:
        """From now on these media: the clean ones, or decorators around them."""
        assert media.size_bytes == self.size_bytes
        self.gather, self.write, self.erase = media.gather, media.write, media.erase
        self.sync, self.close = media.sync, media.close
        self.copy_units = direct_copy(media)
