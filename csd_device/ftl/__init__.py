"""Flash translation layer: 4 KiB sectors (LPN) over larger NAND pages, kept over `kill -9`.

    Ftl.open(directory, config: DriveConfig) -> Ftl     takes the folder's lock; DriveRefused
        .capacity_sectors .used_sectors                 in sectors of SECTOR_BYTES = 4096
        .mapping_bytes                                  on-drive DRAM of the L2P table
        .read(offset_bytes, out uint8[n]) -> PageReads
        .read_units(offsets_bytes int64[n], unit_bytes, out uint8[n, unit_bytes]) -> PageReads
        .write(lpn, data, fua=False, stream=Stream.HOST) -> PagePrograms
                                                        data: whole sectors, bytes-like or uint8[n]
        .deallocate(lpn, count), .write_zeroes(lpn, count), .deallocate_all()
        .is_mapped(lpn, count) -> bool[count]
        .flush() -> PagePrograms
        .pass_time(now_ns), .work_idle(sectors_max) -> PagePrograms | None
        .counters() -> Counters                         programs, erases, WAF, wear, spares
        .table, .reverse, .superblocks, .pointers       the state, to be looked at
        .check()                                        asserts the invariants
        .close()
    PageReads(ppns int64[], transfer_bytes int64[])     each page once; whole sectors moved
    PagePrograms(ppns int64[], transfer_bytes int64[], erased_ppns int64[], moved: Moves | None)

Unmapped sectors read as zeroes and touch no page. What lies beyond the namespace raises
LbaOutOfRange, what garbage collection cannot make room for CapacityExceeded, and any change of a
drive whose spares have run out WriteProtected, before anything changed.
A write is all or nothing after a crash, and there for certain once a flush (or FUA) returned.
"""

from csd_device.ftl.placement import Stream
from csd_device.ftl.programs import Moves, PagePrograms
from csd_device.ftl.translation import Counters, Ftl, PageReads

__all__ = ["Counters", "Ftl", "Moves", "PagePrograms", "PageReads", "Stream"]
