"""Many reads with one call: the steps of `handle_read` compiled, command after command.

    read_batch(controller, slbas int64[n], blocks, arrival_ns int64[n]) -> done_ns int64[n]
    read_closed_loop(controller, slbas int64[n], blocks, slots_ns int64[depth])
        -> (submitted_ns int64[n], done_ns int64[n])

Each command goes through the same lanes as on a queue pair: a core of the firmware, the L2P table,
dies and channels, the link; so the times are those that a queue pair would give. A closed loop
submits the next command the moment one completes: `slots_ns` holds when each of `depth` slots
becomes free, and afterwards when it will; pass it on to go on. There are no CIDs, no completions
and no abort here. With `out` uint8[n, blocks * 4096] the data moves as well. Where bit errors are
switched on it moves anyway, as only the bytes tell what a read retry adds to each page.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from csd_device.bookings import Bookings, forget, stream
from csd_device.config import SECTOR_BYTES
from csd_device.errors import CommandError, LbaOutOfRange
from csd_device.firmware.controller import Controller
from csd_device.firmware.modelled_time import DriveTime, spread_sectors, thin_out
from csd_device.nand.media import Retries
from csd_device.nand.timeline import Batch, schedule, schedule_one
from csd_protocol.status import Status

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]


PIECE_BYTES = 1 << 20  # of data that moves at a time


class _Path(NamedTuple):
    """What a read passes, and what it costs there; nanoseconds."""

    table: U32  # L2P: PSA + 1, or 0
    sectors_per_page: int
    blocks: int  # of each command
    firmware_ns: int
    cores: I64  # [firmware cores] when each is free
    moves_ns: I64  # [sectors_per_page + 1] bus time of so many sectors
    link_ns: int  # of one command's data
    link: Bookings
    slow_psas: I64  # [m] sectors that take the array longer, ascending
    slow_ns: I64  # [m] how much


@njit(nogil=True, cache=True)
def _extra_of(path: Any, psa: Any) -> Any:
    """What the array takes longer for a sector."""
    at = np.searchsorted(path.slow_psas, psa)
    is_slow = at < path.slow_psas.shape[0] and path.slow_psas[at] == psa
    return path.slow_ns[at] if is_slow else np.int64(0)


@njit(nogil=True, cache=True)
def _pages_of(path: Any, slba: Any, pages: Any, sectors: Any) -> Any:
    """Fills in the pages of a command and the sectors and retries of each; how many pages."""
    ppns, count, has_extra = pages.ppns, 0, path.slow_psas.shape[0] > 0
    for lba in range(slba, slba + path.blocks):
        entry = np.int64(path.table[lba])
        if entry == 0:
            continue
        ppn = (entry - 1) // path.sectors_per_page
        if count == 0 or ppns[count - 1] != ppn:
            ppns[count], sectors[count] = ppn, 0
            if has_extra:
                pages.extra[count] = 0
            count += 1
        sectors[count - 1] += 1
        if has_extra:
            pages.extra[count - 1] = max(pages.extra[count - 1], _extra_of(path, entry - 1))
    return count


@njit(nogil=True, cache=True)
def _read_flash(
    path: Any, state: Any, rules: Any, operation: Any, pages: Any, sectors: Any, count: Any
) -> Any:
    """When each part of the data is in DRAM."""
    for index in range(count):
        pages.moves[index] = path.moves_ns[sectors[index]]
    if count == 1:
        schedule_one(state, rules, operation, pages)
        return spread_sectors(pages.done[:1], pages.moves[:1], sectors[:1])
    part = Batch(
        pages.arrivals[:count],
        pages.ppns[:count],
        pages.moves[:count],
        pages.extra[:count],
        pages.done[:count],
    )
    schedule(state, rules, operation, part)
    return thin_out(spread_sectors(part.done, part.moves, sectors[:count]))


@njit(nogil=True, cache=True)
def _serve(
    path: Any, state: Any, rules: Any, operation: Any, pages: Any, sectors: Any,
    slba: Any, arrival: Any,
) -> Any:  # fmt: skip
    """One read command: when it is done, and how many pages it read."""
    core = path.cores.argmin()
    now = max(path.cores[core], arrival) + path.firmware_ns
    path.cores[core] = now
    count = _pages_of(path, slba, pages, sectors)
    if count:
        pages.arrivals[:count] = now
        flow = _read_flash(path, state, rules, operation, pages, sectors, count)
    else:
        flow = np.full(1, now, np.int64)
    forget(path.link, 0, arrival)
    stream(path.link, 0, flow, path.link_ns)
    return flow[-1], count


@njit(nogil=True, cache=True)
def _serve_all(
    path: Any, state: Any, rules: Any, operation: Any, slbas: Any, submitted: Any, done: Any
) -> Any:
    """Commands as they arrive; how many pages they read."""
    pages, sectors = _scratch(path)
    page_reads = 0
    for index in range(slbas.shape[0]):
        done[index], count = _serve(
            path, state, rules, operation, pages, sectors, slbas[index], submitted[index]
        )
        page_reads += count
    return page_reads


@njit(nogil=True, cache=True)
def _serve_loop(
    path: Any, state: Any, rules: Any, operation: Any, slbas: Any, slots: Any,
    submitted: Any, done: Any,
) -> Any:  # fmt: skip
    """Commands as slots become free (a heap); how many pages they read."""
    pages, sectors = _scratch(path)
    page_reads = 0
    for index in range(slbas.shape[0]):
        submitted[index] = slots[0]
        done[index], count = _serve(
            path, state, rules, operation, pages, sectors, slbas[index], slots[0]
        )
        page_reads += count
        _replace_first(slots, done[index])
    return page_reads


@njit(nogil=True, cache=True)
def _scratch(path: Any) -> Any:
    blocks = path.blocks
    pages = Batch(
        np.empty(blocks, np.int64),
        np.empty(blocks, np.int64),
        np.empty(blocks, np.int64),
        np.empty(blocks if path.slow_psas.shape[0] else 0, np.int64),
        np.empty(blocks, np.int64),
    )
    return pages, np.empty(blocks, np.int64)


@njit(nogil=True, cache=True)
def _replace_first(heap: Any, value: Any) -> None:
    """Takes the least out of a binary heap and puts `value` in."""
    at, size = 0, heap.shape[0]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = value


def read_batch(
    controller: Controller, slbas: I64, blocks: int, arrival_ns: I64, out: U8 | None = None
) -> I64:
    """When each command is done [n]; those that arrive first come first in the arrays.

    With time off, when they arrived. Raises CommandError, before anything happens: LBA Out of
    Range, Invalid Field beyond MDTS; and what the media raise when data moves (UnrecoveredRead).
    """
    assert slbas.shape == arrival_ns.shape
    _check(controller, slbas, blocks)
    slow = _move_data(controller, slbas, blocks, out)
    done = arrival_ns.copy()
    page_reads = 0
    if controller.time and slbas.size:
        path, timeline = _path(controller, controller.time, blocks, slow), controller.time.nand
        page_reads = _serve_all(
            path, timeline.state, timeline.rules, timeline.read, slbas, arrival_ns, done
        )
    _count(controller, blocks, page_reads, done - arrival_ns)
    return done


def read_closed_loop(
    controller: Controller, slbas: I64, blocks: int, slots_ns: I64, out: U8 | None = None
) -> tuple[I64, I64]:
    """When each command was submitted and when it is done [n]; `slots_ns` [depth] is updated.

    Slots that are all free at one time are a valid start. With time off nothing takes time.
    Raises as `read_batch` does.
    """
    _check(controller, slbas, blocks)
    slow = _move_data(controller, slbas, blocks, out)
    slots_ns.sort()
    submitted = np.full(slbas.size, slots_ns[0], np.int64)
    done = submitted.copy()
    page_reads = 0
    if controller.time and slbas.size:
        path, timeline = _path(controller, controller.time, blocks, slow), controller.time.nand
        page_reads = _serve_loop(
            path, timeline.state, timeline.rules, timeline.read, slbas, slots_ns, submitted, done
        )
    _count(controller, blocks, page_reads, done - submitted)
    return submitted, done


def _path(controller: Controller, time: DriveTime, blocks: int, slow: Retries) -> _Path:
    per_page = controller.config.geometry.sectors_per_page
    sizes = np.arange(per_page + 1, dtype=np.int64) * SECTOR_BYTES
    return _Path(
        table=controller.ftl.table,
        sectors_per_page=per_page,
        blocks=blocks,
        firmware_ns=time.link_model.firmware_ns,
        cores=time.processor.free_ns,
        moves_ns=time.nand.moves_ns(sizes),
        link_ns=time.link_model.transfer_ns(blocks * SECTOR_BYTES),
        link=time.link_down.bookings,
        slow_psas=slow.psas,
        slow_ns=slow.extra_ns,
    )


def _check(controller: Controller, slbas: I64, blocks: int) -> None:
    limit = controller.config.queues.mdts_bytes
    if not 0 < blocks * SECTOR_BYTES <= limit:
        raise CommandError(
            Status.INVALID_FIELD, f"{blocks} blocks in one command; 1 to {limit // SECTOR_BYTES} go"
        )
    if slbas.size and (slbas.min() < 0 or slbas.max() + blocks > controller.ftl.capacity_sectors):
        worst = int(slbas.min()) if slbas.min() < 0 else int(slbas.max())
        raise LbaOutOfRange(worst, blocks, controller.ftl.capacity_sectors)


def _move_data(controller: Controller, slbas: I64, blocks: int, out: U8 | None) -> Retries:
    """Moves the data where it is wanted or tells how long it takes; the sectors retried."""
    unit_bytes = blocks * SECTOR_BYTES
    if out is None and not controller.faults.may_retry:
        return _NO_RETRIES
    step = max(1, PIECE_BYTES // unit_bytes)
    retries = [_NO_RETRIES]
    for start in range(0, slbas.size, step):
        offsets = slbas[start : start + step] * SECTOR_BYTES
        room = (offsets.size, unit_bytes)
        piece = np.empty(room, np.uint8) if out is None else out[start : start + step]
        reads = controller.ftl.read_units(offsets, unit_bytes, piece)
        retries.append(reads.retries or _NO_RETRIES)
    # A sector takes the same each time, so of each any will do.
    psas, first = np.unique(np.concatenate([part.psas for part in retries]), return_index=True)
    return Retries(psas, np.concatenate([part.extra_ns for part in retries])[first])


_NO_RETRIES = Retries(np.empty(0, np.int64), np.empty(0, np.int64))


def _count(controller: Controller, blocks: int, page_reads: int, took_ns: I64) -> None:
    """What a queue pair would have counted."""
    counters = controller.counters
    counters.host_read_commands += took_ns.size
    counters.read_bytes += took_ns.size * blocks * SECTOR_BYTES
    counters.nand_page_reads += page_reads
    counters.busy_ns += int(took_ns.sum())
