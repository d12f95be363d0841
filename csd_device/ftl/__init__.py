"""Flash translation layer: 4 KiB sectors (LPN) over larger NAND pages, kept over `kill -9`.

    Ftl.open(directory, config: DriveConfig) -> Ftl     takes the folder's lock; DriveRefused
        .capacity_sectors .used_sectors                 in sectors of SECTOR_BYTES = 4096
        .mapping_bytes                                  on-drive DRAM of the L2P table
        .read(offset_bytes, out uint8[n]) -> PageReads
        .read_units(offsets_bytes int64[n], unit_bytes, out uint8[n, unit_bytes]) -> PageReads
        .write(lpn, data, fua=False) -> PagePrograms    data: whole sectors, bytes-like or uint8[n]
        .deallocate(lpn, count), .write_zeroes(lpn, count), .deallocate_all()
        .is_mapped(lpn, count) -> bool[count]
        .flush() -> PagePrograms
        .counters() -> Counters                         programs, erases, WAF, wear
        .close()
    PageReads(ppns int64[], transfer_bytes int64[])     each page once; whole sectors moved
    PagePrograms(ppns int64[], transfer_bytes int64[], erased_ppns int64[])

Unmapped sectors read as zeroes and touch no page. What lies beyond the namespace raises
LbaOutOfRange, what no erased superblock can take CapacityExceeded, before anything changed.
A write is all or nothing after a crash, and there for certain once a flush (or FUA) returned.
"""

from csd_device.ftl.translation import Counters, Ftl, PagePrograms, PageReads
from csd_device.ftl.victims import VictimPolicy, WhollyInvalid

__all__ = ["Counters", "Ftl", "PagePrograms", "PageReads", "VictimPolicy", "WhollyInvalid"]
