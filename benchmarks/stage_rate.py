"""Staging 10,000 units from NAND into the window, over a memcpy of as many bytes.

A unit is a neuron of 24,576 bytes (LLaMA 3 8B's size at 16 bits), 10,000 of them an FFN site on
`edge-gen5`, staged by one STAGE command in-process, time off. The media is in the page cache, and
media, window and the two arrays that numpy copies in the same round are mapped and were touched
before. One thread on both sides.

Without a unit cache one site is staged again and again. With one, bytes go to two places; the cache
is smaller than a site and two sites are staged in turns, so that every unit comes from NAND all
the same (the benchmark fails if one does not), and pages that were let go are mapped again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from benchmarks.ratio import Ratio
from benchmarks.stopwatch import seconds_of
from csd_device.clock import TimeMode, VirtualClock
from csd_device.config import load_config
from csd_device.drive import Drive
from csd_device.firmware import QueuePair
from csd_device.firmware import commands as c
from csd_protocol import packed as pk
from csd_protocol.crc32c import crc32c_units
from csd_protocol.units import MIB, format_size

U8 = npt.NDArray[np.uint8]

FLOOR, FLOOR_CACHED = 0.60, 0.40
HIDDEN, ROWS, F16_BYTES = 4096, 3, 2
MODEL = 1
CACHE_BYTES = 128 * MIB
WARM_UP = 4  # rounds that do not count


def run(tiny: bool) -> list[Ratio]:
    count, rounds = (200, 2) if tiny else (10_000, 15)
    cache_bytes = 2 * MIB if tiny else CACHE_BYTES
    return [
        _measure("no unit cache", 0, 1, count, rounds, FLOOR),
        _measure(
            f"a unit cache of {format_size(cache_bytes)}",
            cache_bytes,
            2,
            count,
            rounds,
            FLOOR_CACHED,
        ),
    ]


def _measure(
    name: str, cache_bytes: int, sites: int, count: int, rounds: int, floor: float
) -> Ratio:
    with _packed_drive(cache_bytes, sites, count) as (queue, units):
        copied = np.zeros_like(units)
        stage_s, copy_s = [], []
        for turn in range(WARM_UP + rounds):
            stage_s.append(seconds_of(partial(_stage, queue, turn % sites, count)))
            copy_s.append(seconds_of(partial(np.copyto, copied, units)))
    staged_s, copied_s = stage_s[WARM_UP:], copy_s[WARM_UP:]
    best = f"{units.size / min(staged_s) / 1e9:.1f} of {units.size / min(copied_s) / 1e9:.1f} GB/s"
    return Ratio(
        name=f"staging {count:,} units of {units.shape[1]:,} bytes, {name}",
        ours=units.size / median(staged_s) / 1e9,
        reference=units.size / median(copied_s) / 1e9,
        unit="GB/s",
        floor=floor,
        against="numpy's copy of as many bytes (memcpy), one thread",
        notes=f"medians of {rounds} rounds in turns, best {best}; all from NAND, CRC32C checked",
    )


def _stage(queue: QueuePair, site: int, count: int) -> None:
    """One site into the window, what was staged before released first.

    Units are named, since a scan leaves most of the unit cache as it is.
    """
    _ok(queue, c.Release(()))
    target = c.Target(site, c.What.UNITS, units=np.arange(count, dtype=np.uint32))
    result = _ok(queue, c.Stage(MODEL, (target,)))
    assert isinstance(result, c.StageResult)
    assert result.sites[0].unit_count == count
    assert result.sites[0].units_from_dram == 0


def _ok(queue: QueuePair, command: c.Command) -> c.Result:
    queue.submit(0, command, 0)
    (completion,) = queue.pop_due(1 << 62)
    assert completion.status.value.sc == 0, completion
    return completion.result


@contextmanager
def _packed_drive(cache_bytes: int, sites: int, count: int) -> Iterator[tuple[QueuePair, U8]]:
    """A queue pair of a drive that holds the model, and the units of its first site."""
    config = load_config("edge-gen5")
    dram = config.dram.model_copy(update={"unit_cache_bytes": cache_bytes})
    with TemporaryDirectory(prefix="csd-bench-") as folder:
        drive = Drive.open(
            config.model_copy(update={"dram": dram}),
            Path(folder) / "drive.csd",
            clock=VirtualClock(),
            time_mode=TimeMode.OFF,
        )
        try:
            queue = drive.connect("benchmark", "benchmark")
            yield queue, _pack(queue, sites, count)
        finally:
            drive.close()


def _pack(queue: QueuePair, site_count: int, count: int) -> U8:
    """Packs sites of random units; those of the first [count, unit_bytes]."""
    rng = np.random.default_rng(1)
    unit_bytes = ROWS * HIDDEN * F16_BYTES
    sites = [rng.integers(0, 256, (count, unit_bytes), np.uint8) for _ in range(site_count)]
    table = np.concatenate([crc32c_units(units) for units in sites]).view(np.uint8)
    manifest_at, table_at = pk.MODELS_OFFSET_BYTES, pk.MODELS_OFFSET_BYTES + MIB
    first = pk.align_up(table_at + table.size, pk.BLOCK_BYTES)
    described = tuple(_site(index, count, first) for index in range(site_count))
    manifest = pk.encode_manifest(
        pk.PackedModel(
            name="bench",
            family="llama",
            config={},
            dtype="float16",
            source="benchmark",
            fingerprint="bench",
            sites=described,
            crc_table=pk.Extent(offset_bytes=table_at, length_bytes=table.size),
        )
    )
    end = described[-1].offset_bytes + sites[-1].size
    directory = _directory(manifest_at, len(manifest), end)
    _write(queue, 0, np.frombuffer(directory, np.uint8))
    _write(queue, manifest_at, np.frombuffer(manifest, np.uint8))
    _write(queue, table_at, table)
    for site, units in zip(described, sites, strict=True):
        _write(queue, site.offset_bytes, units.reshape(-1))
    return sites[0]


def _site(index: int, count: int, first: int) -> pk.Site:
    return pk.Site(
        site=index,
        role=pk.Role.FFN,
        kind=pk.UnitKind.NEURON,
        layer=index,
        count=count,
        rows=ROWS,
        cols=HIDDEN,
        offset_bytes=first + index * count * ROWS * HIDDEN * F16_BYTES,
        first_crc=index * count,
    )


def _directory(manifest_at: int, manifest_bytes: int, end: int) -> bytes:
    extent = pk.Extent(offset_bytes=manifest_at, length_bytes=end - manifest_at)
    entry = pk.DirectoryEntry(
        model=MODEL,
        name="bench",
        state="complete",
        fingerprint="bench",
        extent=extent,
        manifest=pk.Extent(offset_bytes=manifest_at, length_bytes=manifest_bytes),
        progress=pk.Extent(offset_bytes=manifest_at, length_bytes=0),
    )
    return pk.encode_directory(pk.Directory(generation=0, models=(entry,)))


def _write(queue: QueuePair, offset_bytes: int, data: U8) -> None:
    for start in range(0, data.size, MIB):
        piece = data[start : start + MIB].tobytes()
        whole = piece.ljust(pk.align_up(len(piece), pk.BLOCK_BYTES), b"\0")
        _ok(queue, c.Write((offset_bytes + start) // pk.BLOCK_BYTES, whole))
