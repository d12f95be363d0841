"""What the drive counts since it was opened: the SMART page's figures."""

from dataclasses import dataclass

DATA_UNIT_BYTES = 512 * 1000  # NVMe counts data in thousands of 512 bytes, rounded up


@dataclass(slots=True)
class Counters:
    """All since the drive was opened; `*_bytes` as hosts asked for them."""

    host_read_commands: int = 0
    host_write_commands: int = 0
    compute_commands: int = 0
    admin_commands: int = 0
    failed_commands: int = 0
    aborted_commands: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    staged_bytes: int = 0
    nand_page_reads: int = 0
    media_errors: int = 0
    busy_ns: int = 0  # modelled, summed over commands

    @property
    def data_units_read(self) -> int:
        """Data that left over the link: what was read, and what was staged."""
        return -(-(self.read_bytes + self.staged_bytes) // DATA_UNIT_BYTES)

    @property
    def data_units_written(self) -> int:
        return -(-self.written_bytes // DATA_UNIT_BYTES)
