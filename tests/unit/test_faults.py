"""Faults of the media: the errors they make, by the equations of docs/FAULTS.md."""

import contextlib
import math
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from csd_device.config import DriveConfig, load_config
from csd_device.errors import ConfigRefused, UnrecoveredRead, WriteFault
from csd_device.fault_config import BitErrors, Failures, FaultsConfig, Unreadable
from csd_device.nand import Media, Pieces, RamMedia
from csd_device.nand.faults import FaultCounters, Surroundings, faulty
from csd_device.nand.faults.bit_errors import (
    CODEWORD_BITS,
    NS_PER_DAY,
    BitErrorMedia,
    model_of,
    rate_of,
    safe_rate,
    sense,
)
from csd_device.nand.faults.dice import key_of, throw
from csd_device.nand.media import U8, Retries
from csd_device.nand.superblocks import Superblocks

SECTOR = 4096
CONFIG = load_config("tiny")
GEOMETRY = CONFIG.geometry.model_copy(update={"blocks_per_plane": 4})
SMALL = CONFIG.model_copy(update={"geometry": GEOMETRY})
SECTORS = GEOMETRY.sectors_per_superblock
DATA = np.random.default_rng(7).integers(0, 256, SECTORS * SECTOR, np.uint8)


class Bench:
    """Superblock 0 of a small drive, filled, behind whatever faults a test asks for."""

    def __init__(self, config: DriveConfig = SMALL) -> None:
        self.clean = RamMedia(config.geometry.raw_bytes)
        self.clean.write(0, DATA)
        self.superblocks = Superblocks(config.geometry.blocks_per_plane)
        self.now_ns = 0
        self.counters = FaultCounters()
        self.around = Surroundings(config, self.superblocks, lambda: self.now_ns, self.counters)

    def with_faults(self, lost: tuple[int, ...] = (), seed: int = 0, **faults: object) -> Media:
        settings = FaultsConfig.model_validate({"seed": seed, **faults})
        return faulty(self.clean, settings, self.around, np.array(lost, np.int64))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def read(media: Media, psas: list[int]) -> tuple[U8, Retries | None]:
    """Whole sectors, one after the other."""
    out = np.zeros(len(psas) * SECTOR, np.uint8)
    starts = np.array(psas, np.int64) * SECTOR
    return out, media.gather(pieces(starts, np.full(len(psas), SECTOR)), out)


def pieces(starts: np.ndarray, lengths: np.ndarray) -> Pieces:
    targets = np.cumsum(lengths) - lengths
    return Pieces(starts.astype(np.int64), lengths.astype(np.int64), targets.astype(np.int64))


def wrong_bits(media: Media, psas: list[int]) -> np.ndarray:
    """Bits that differ from what was written, by sector; what the code does not correct."""
    out = np.zeros(len(psas) * SECTOR, np.uint8)
    starts = np.array(psas, np.int64) * SECTOR
    with contextlib.suppress(UnrecoveredRead):
        media.gather(pieces(starts, np.full(len(psas), SECTOR)), out)
    rows = DATA.reshape(-1, SECTOR)[psas]
    return np.unpackbits(out.reshape(rows.shape) ^ rows, axis=1).sum(axis=1)


BARE = {"correctable_bits_per_kib": 0, "retry_levels": 0}  # what is sensed goes out


# ---- flipped bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1e-4, 3e-3, 2e-2])
def test_flipped_bits_are_binomial(bench: Bench, rate: float) -> None:
    media = bench.with_faults(bit_errors={"rate": rate, **BARE})
    counts = wrong_bits(media, list(range(SECTORS)))
    mean, variance = CODEWORD_BITS * rate, CODEWORD_BITS * rate * (1 - rate)
    assert abs(counts.mean() - mean) < 5 * math.sqrt(variance / SECTORS)
    # The variance of a sample of n has a standard deviation of about sqrt(2 / n) of itself.
    assert abs(counts.var() / variance - 1) < 5 * math.sqrt(2 / SECTORS)


def test_flipped_bits_lie_anywhere(bench: Bench) -> None:
    media = bench.with_faults(bit_errors={"rate": 0.01, **BARE})
    out = np.zeros(DATA.size, np.uint8)
    with pytest.raises(UnrecoveredRead):
        media.gather(pieces(np.array([0]), np.array([DATA.size])), out)
    flipped = np.unpackbits((out ^ DATA).reshape(-1, SECTOR), axis=1).sum(axis=0)
    by_part = flipped.reshape(8, -1).sum(axis=1)
    expected = 0.01 * SECTORS * CODEWORD_BITS / 8
    assert (np.abs(by_part - expected) < 5 * math.sqrt(expected)).all()


def test_a_seed_replays_its_errors_and_another_does_not(bench: Bench) -> None:
    def sensed(seed: int) -> bytes:
        media = bench.with_faults(seed=seed, bit_errors={"rate": 1e-3, **BARE})
        out = np.zeros(4 * SECTOR, np.uint8)
        with pytest.raises(UnrecoveredRead):
            media.gather(pieces(np.array([0]), np.array([out.size])), out)
        return out.tobytes()

    assert sensed(1) == sensed(1)
    assert sensed(1) != sensed(2)
    before = sensed(1)
    bench.superblocks.erases[0] += 1
    assert sensed(1) != before


def test_errors_of_a_part_are_those_of_the_whole(bench: Bench) -> None:
    media = bench.with_faults(bit_errors={"rate": 5e-3, **BARE})
    whole, parts = np.zeros(3 * SECTOR, np.uint8), np.zeros(3 * SECTOR, np.uint8)
    cuts = np.array([0, 100, 4000, 5000, 9000, 3 * SECTOR])
    with pytest.raises(UnrecoveredRead):
        media.gather(pieces(np.array([0]), np.array([whole.size])), whole)
    with pytest.raises(UnrecoveredRead):
        media.gather(pieces(cuts[:-1], np.diff(cuts)), parts)
    assert (whole == parts).all()


def test_a_higher_rate_adds_errors_to_those_that_were_there() -> None:
    few, many = np.empty(CODEWORD_BITS, np.int32), np.empty(CODEWORD_BITS, np.int32)
    for psa in range(20):
        key = np.uint64(key_of(3, psa, 0))
        counts = sense(key, 0, 1e-3, few), sense(key, 0, 4e-3, many)
        assert counts[0] < counts[1]
        assert (np.diff(many[: counts[1]]) > 0).all()


def test_dice_are_even() -> None:
    things = np.arange(100_000)
    thrown = throw(5, things, np.zeros_like(things))
    assert 0 < thrown.min() < 1e-3 < 1 - 1e-3 < thrown.max() <= 1
    assert abs(thrown.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(thrown[1:], thrown[:-1])[0, 1]) < 0.02


# ---- the rate --------------------------------------------------------------------------------


def rate(cycles: int = 0, days: float = 0, reads: int = 0, cell: str = "tlc") -> float:
    timing = CONFIG.timing.model_copy(update={"cell": type(CONFIG.timing.cell)(cell)})
    config = CONFIG.model_copy(update={"timing": timing})
    model = model_of(BitErrors(added_cycles=cycles, added_days=days), config)
    return rate_of(model, 0, reads * CONFIG.geometry.pages_per_superblock, 0)


@pytest.mark.parametrize("what", ["cycles", "days", "reads"])
def test_wear_age_and_reads_each_raise_the_rate(what: str) -> None:
    rates = [rate(**{what: amount}) for amount in (0, 100, 1000, 5000)]
    assert rates == sorted(set(rates))


def test_cells_with_more_bits_err_more() -> None:
    rates = [rate(cell=cell) for cell in ("slc", "mlc", "tlc", "qlc")]
    assert rates == sorted(set(rates))


def test_the_rate_is_that_of_the_published_coefficients() -> None:
    """Kim et al., FAST 2019, 72-layer TLC: at 3,000 cycles, 365 days and 1,000 reads a page."""
    wear, retention, disturb = 3.90e-10 * 3000**2.05, 6.28e-5 * 3000**0.14, 3.73e-9 * 3000**0.33
    published = 1.48e-3 + wear + retention * 365**0.54 + disturb * 1000**1.71
    assert rate(cycles=2999, days=365, reads=1000) == pytest.approx(published, rel=1e-3)
    half = 1.48e-3 + 3.90e-10 * 1500**2.05 + 6.28e-5 * 1500**0.14 * 30**0.54
    assert rate(cycles=1499, days=30) == pytest.approx(half, rel=1e-3)


def test_data_ages_by_the_drives_clock(bench: Bench) -> None:
    media = bench.with_faults(bit_errors={"cell_factors": [1, 1, 1, 1], **BARE})
    fresh = wrong_bits(media, [0, 1, 2])
    bench.now_ns = 1000 * NS_PER_DAY
    aged = wrong_bits(media, [0, 1, 2])
    assert (aged > fresh).all()
    bench.superblocks.written_ns[0] = bench.now_ns
    assert (wrong_bits(media, [0, 1, 2]) == fresh).all()


# ---- the code and read retry -----------------------------------------------------------------


def test_the_code_corrects_t_bits_and_not_one_more(bench: Bench) -> None:
    counts = wrong_bits(bench.with_faults(bit_errors={"rate": 2e-3, **BARE}), list(range(SECTORS)))
    strength = {"correctable_bits_per_kib": 16, "retry_levels": 0}  # 64 bits of a codeword
    assert {64, 65} <= set(counts.tolist())
    media = bench.with_faults(bit_errors={"rate": 2e-3, **strength})
    for psa in np.flatnonzero(np.abs(counts - 64) <= 1).tolist():
        if counts[psa] <= 64:
            assert (read(media, [psa])[0] == DATA.reshape(-1, SECTOR)[psa]).all()
        else:
            with pytest.raises(UnrecoveredRead, match=f"sector {psa}: more than 64 wrong bits"):
                read(media, [psa])


def test_each_retry_costs_one_array_read_of_its_page_type() -> None:
    timing = CONFIG.timing.model_copy(
        update={"cell": type(CONFIG.timing.cell)("tlc"), "read_ns": (1000, 2000, 4000)}
    )
    bench = Bench(SMALL.model_copy(update={"timing": timing}))
    settings = {"rate": 1.1e-2, "retry_rate_factor": 0.9, "retry_levels": 20}
    media = bench.with_faults(bit_errors=settings)
    out, retries = read(media, list(range(SECTORS)))
    assert (out == DATA).all()
    assert retries is not None
    levels = _levels_by_hand(settings)
    assert retries.psas.tolist() == np.flatnonzero(levels).tolist()
    pages = retries.psas // GEOMETRY.sectors_per_page // GEOMETRY.planes
    tr_ns = np.array([1000, 2000, 4000])[pages % 3]
    assert (retries.extra_ns == levels[retries.psas] * tr_ns).all()
    assert bench.counters.retries == levels.sum()
    assert bench.counters.retried_sectors == np.count_nonzero(levels)
    assert bench.counters.corrected_sectors == SECTORS - np.count_nonzero(levels)


def _levels_by_hand(settings: dict[str, float]) -> np.ndarray:
    """The first level whose sense has at most 288 wrong bits, of each sector."""
    positions = np.empty(CODEWORD_BITS, np.int32)
    levels = np.zeros(SECTORS, np.int64)
    for psa in range(SECTORS):
        rate, key = settings["rate"], np.uint64(key_of(0, psa, 0))
        while sense(key, levels[psa], rate, positions) > 288:
            levels[psa], rate = levels[psa] + 1, rate * settings["retry_rate_factor"]
    return levels


def test_what_no_level_corrects_is_named(bench: Bench) -> None:
    media = bench.with_faults(bit_errors={"rate": 0.3})
    with pytest.raises(UnrecoveredRead, match=r"physical sectors 3, 5: more than 288 .* 8 retries"):
        read(media, [5, 3])
    assert bench.counters.uncorrectable_sectors == 2
    assert bench.counters.retries == 16


def test_low_rates_are_not_looked_at(bench: Bench) -> None:
    assert safe_rate(288) == pytest.approx(4.9e-3, rel=0.1)
    media = bench.with_faults(bit_errors={"rate": 1e-3})
    out, retries = read(media, list(range(SECTORS)))
    assert (out == DATA).all()
    assert retries is None
    assert bench.counters.corrected_bits == round(1e-3 * CODEWORD_BITS * SECTORS)
    assert bench.counters.corrected_sectors == 0


def test_no_codeword_fails_at_a_safe_rate() -> None:
    """The exact tail of the binomial, summed, against the bound that `safe_rate` goes by."""
    for correctable in (4, 64, 288):
        rate = safe_rate(correctable)
        log_tail = [
            math.lgamma(CODEWORD_BITS + 1) - math.lgamma(k + 1) - math.lgamma(CODEWORD_BITS - k + 1)
            + k * math.log(rate) + (CODEWORD_BITS - k) * math.log1p(-rate)
            for k in range(correctable + 1, correctable + 200)
        ]  # fmt: skip
        assert 1e-19 < sum(map(math.exp, log_tail)) < 1e-15


def test_times_of_two_faults_add_up(bench: Bench) -> None:
    inner = bench.with_faults(bit_errors={"rate": 1e-2})
    _, once = read(inner, list(range(64)))
    outer = BitErrorMedia(
        inner, bench.counters, BitErrors(rate=1e-2), SMALL, bench.superblocks, lambda: 0, 0
    )
    _, twice = read(outer, list(range(64)))
    assert once is not None
    assert twice is not None
    assert (twice.psas == once.psas).all()
    assert (twice.extra_ns == 2 * once.extra_ns).all()


# ---- unreadable sectors, failed programs and erases ------------------------------------------


def test_named_sectors_cannot_be_read_until_they_are_erased(bench: Bench) -> None:
    media = bench.with_faults(lost=(4, 9), unreadable=Unreadable(psas=((4, 1), (9, 1))))
    with pytest.raises(UnrecoveredRead, match="physical sectors 4, 9 cannot be read") as error:
        read(media, [9, 3, 4])
    assert error.value.psas is not None
    assert error.value.psas.tolist() == [4, 9]
    assert (read(media, [3, 5])[0] == DATA.reshape(-1, SECTOR)[[3, 5]].reshape(-1)).all()
    bench.superblocks.erases[0] += 1
    read(media, [4, 9])


def test_a_share_of_all_sectors_cannot_be_read(bench: Bench) -> None:
    media = bench.with_faults(unreadable={"rate": 0.02})
    with pytest.raises(UnrecoveredRead) as error:
        read(media, list(range(SECTORS)))
    assert error.value.psas is not None
    expected = 0.02 * SECTORS
    assert abs(error.value.psas.size - expected) < 5 * math.sqrt(expected)
    good = np.setdiff1d(np.arange(SECTORS), error.value.psas)[:10].tolist()
    read(media, good)


def test_a_failed_program_says_where_and_leaves_what_came_before(bench: Bench) -> None:
    media = bench.with_faults(program_failures=Failures(rate=0.03))
    with pytest.raises(WriteFault, match=r"page [0-9]+ of superblock 1") as error:
        media.write(SECTORS * SECTOR, DATA)
    address = error.value.address
    assert address is not None
    assert address % GEOMETRY.page_bytes == 0
    done = address - SECTORS * SECTOR
    assert (read(bench.clean, list(range(SECTORS, 2 * SECTORS)))[0][:done] == DATA[:done]).all()
    assert bench.counters.program_failures == 1
    with pytest.raises(WriteFault):  # to try again does not help
        media.write(address, DATA[:SECTOR])


def test_named_superblocks_fail_and_others_do_not(bench: Bench) -> None:
    failing = {"superblocks": [2]}
    media = bench.with_faults(program_failures=failing, erase_failures=failing)
    size = SECTORS * SECTOR
    media.write(size, DATA)
    media.erase(size, size)
    with pytest.raises(WriteFault) as program:
        media.write(2 * size + 5 * SECTOR, DATA[:SECTOR])
    assert program.value.address == 2 * size + 5 * SECTOR
    with pytest.raises(WriteFault, match="superblock 2 cannot be erased") as erase:
        media.erase(2 * size, size)
    assert erase.value.address == 2 * size
    assert bench.counters.erase_failures == 1


def test_a_share_of_erases_fails(bench: Bench) -> None:
    media = bench.with_faults(erase_failures={"rate": 0.3})
    failed = 0
    for _ in range(100):
        try:
            media.erase(0, SECTORS * SECTOR)
        except WriteFault:
            failed += 1
        bench.superblocks.erases[0] += 1
    assert 10 < failed < 50


# ---- settings --------------------------------------------------------------------------------


def test_nothing_is_wrapped_around_clean_media(bench: Bench) -> None:
    assert bench.with_faults() is bench.clean
    assert CONFIG.faults == FaultsConfig()


def tiny_with(folder: Path, section: str) -> Path:
    """The drive `tiny` as a file, with a further section."""
    preset = resources.files("csd_device.presets") / "tiny.toml"
    file = folder / "drive.toml"
    file.write_text(f"{preset.read_text()}\n{section}\n")
    return file


@pytest.mark.parametrize(
    "section, said",
    [
        ("[faults.bit_errors]\nrate = 2", "faults.bit_errors.rate: Input should be less than"),
        ("[faults.bit_errors]\nwhat = 2", "faults.bit_errors.what: Extra inputs"),
        ("[faults.unreadable]", "name psas or lbas"),
        ("[faults.program_failures]\nsuperblocks = [288]", "superblock 288; there are 288"),
        ("[faults.slow_dies]\ndies = [[0, 2]]\nread_factor = 2", "die 2 of channel 0; there are 8"),
        ("[faults.slow_dies]\ndies = [[0, 1]]\nread_factor = 0.5", "greater than or equal to 1"),
        ("[faults]\nseed = -1", "faults.seed"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, section: str, said: str) -> None:
    file = tiny_with(tmp_path, section)
    with pytest.raises(ConfigRefused, match=said.replace("[", r"\[")):
        load_config(file)


def test_a_drive_with_faults_loads(tmp_path: Path) -> None:
    loaded = load_config(tiny_with(tmp_path, "[faults.bit_errors]\nadded_cycles = 3000"))
    assert loaded.faults.bit_errors == BitErrors(added_cycles=3000)
