"""On-drive DRAM: who has how much of it, the window the host reads, and the unit cache.

Arena(total_bytes)                      the budget; nothing is allocated by it
    .allot(name, size_bytes) -> Allotment(name, size_bytes)     DramExceeded, with figures
    .resize(name, size_bytes) .free(name) .free_bytes .report() -> dict[str, int]
Window(path, size_bytes)                a file on shared memory, 0644, unlinked on close
    .lease(length_bytes, owner) -> Lease(id, offset, length)    WindowFull, with figures
    .view(offset, length) -> uint8[length]                      writable, no copy
    .release(id, owner) -> None                                 NoLease
    .release_owner(owner) -> int        leases given back
    .leases_of(owner) -> list[Lease]
    .free_bytes .leased_bytes .lease_count .largest_free_bytes .size_bytes .path .close()
UnitCache(capacity_bytes)               key: (model, site)
    .lookup(key, units uint32[n]) -> slots int64[n]             -1: miss
    .copy_out(key, slots int64[m], out uint8[n, unit_bytes], rows int64[m]) -> None
    .claim(key, units uint32[n], unit_bytes) -> Room     slots to fill: .units, .keep
    .own(room)     its units lie in their slots
    .insert(key, units uint32[n], data uint8[n, unit_bytes]) -> int     all three; units kept
    .drop(key) .drop_model(model) .clear() .hits .misses .used_bytes .capacity_bytes
"""

from csd_device.dram.arena import Allotment, Arena
from csd_device.dram.unit_cache import UnitCache
from csd_device.dram.window import Lease, Window

__all__ = ["Allotment", "Arena", "Lease", "UnitCache", "Window"]
