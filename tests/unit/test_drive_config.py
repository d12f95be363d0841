"""Drives as data: presets load, contradictions are refused with their figures."""

import re
from pathlib import Path

import pytest

from csd_device.clock import TimeMode, VirtualClock, WallClock
from csd_device.config import DriveConfig, Link, load_config, preset_names, preset_text
from csd_device.errors import ConfigRefused
from csd_protocol.units import GIB, MIB


def _changed(tmp_path: Path, old: str, new: str) -> str:
    text = (Path(__file__).parents[2] / "csd_device/presets/tiny.toml").read_text()
    assert old in text
    path = tmp_path / "drive.toml"
    path.write_text(text.replace(old, new))
    return str(path)


@pytest.mark.parametrize("name", ["cloud-4x-gen5", "edge-gen5", "end-gen4", "reference", "tiny"])
def test_preset_loads(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    assert config.capacity_bytes < config.geometry.raw_bytes
    assert config.mapping_bytes == config.capacity_bytes // 1024


def test_device_classes_reach_their_bandwidth() -> None:
    for name, bytes_per_s in (("cloud-4x-gen5", 56e9), ("edge-gen5", 14e9), ("end-gen4", 7e9)):
        config = load_config(name)
        seconds = config.link.transfer_ns(1 * GIB) / 1e9
        assert GIB / seconds == pytest.approx(bytes_per_s, rel=0.03)
        buses = config.geometry.channels * config.timing.channel_bytes_per_s
        assert buses > bytes_per_s


def test_a_file_is_read_like_a_preset(tmp_path: Path) -> None:
    path = _changed(tmp_path, '"32 MiB"', '"8 MiB"')
    assert load_config(path).dram.window_bytes == 8 * MIB


@pytest.mark.parametrize(
    "old, new, reason",
    [
        ('"32 MiB"', '"1 GiB"', r"DRAM of 64.0 MiB is less than .* window 1.0 GiB"),
        ('"32 MiB"', "1000", "no multiple of 4096"),
        ('"32 MiB"', '"much"', "dram.window_bytes: .*not a size"),
        ("channels = 8", "channels = 0", "geometry.channels: .*greater than 0"),
        ("channels = 8", "channel = 8", "geometry.channel: Extra inputs"),
        ('page_bytes = "16 KiB"', "page_bytes = 5000", "page_bytes = 5000 is no multiple"),
        ("over_provisioning = 0.10", "over_provisioning = 0.001", "4 superblocks of 4.0 MiB"),
        ("blocks_per_plane = 288", "blocks_per_plane = 99_999_999", "16 TiB"),
        ('name = "tiny"', "name = tiny", "not TOML"),
        ("blocks_per_plane = 288", "", "either geometry.blocks_per_plane or capacity"),
        ("channels = 8", 'layout = "8x2"', "geometry: .*'8x2'; write channels x dies x planes"),
        ("channels = 8", 'layout = "8x2x4"', "says planes_per_die = 4, and planes_per_die = 2"),
        (
            'name = "tiny"',
            'name = "tiny"\ncapacity = "2 GB"',
            "capacity = 1.9 GiB; 8x2x2 with blocks_per_plane = 288 have 1.0 GiB",
        ),
        ('name = "tiny"', 'name = "tiny"\ncapacity = "big"', "capacity: .*not a size"),
        ("read_ns = 20_000", "read_ns = [1, 2]", "read_ns has 2 figures; slc has 1"),
        ("read_ns = 20_000", 'cell = "qlc"\nread_ns = [1, 2, 3]', "read_ns has 3.*qlc has 4"),
        ("read_ns = 20_000", "read_ns = -1", "timing.read_ns"),
        ("read_ns = 20_000", "read_ns = 1\nsuspends_max = 1", "without read_priority"),
        ("command_ns = 290", 'command_ns = 290\nchannel_interface = "x"', "known are onfi-1.0"),
        (
            "command_ns = 290",
            'command_ns = 290\nchannel_interface = "onfi-4.0"',
            "1000; onfi-4.0 ends at 800",
        ),
        ("bytes_per_s = 7_877_000_000", "", "either bytes_per_s, or generation"),
        ("bytes_per_s = 7_877_000_000", "generation = 5", "generation and lanes go together"),
        ("bytes_per_s = 7_877_000_000", "generation = 9\nlanes = 4", "generation"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, old: str, new: str, reason: str) -> None:
    with pytest.raises(ConfigRefused, match=reason):
        load_config(_changed(tmp_path, old, new))


def test_a_layout_states_channels_dies_and_planes(tmp_path: Path) -> None:
    whole = load_config("tiny")
    text = "channels = 8\ndies_per_channel = 2\nplanes_per_die = 2"
    assert load_config(_changed(tmp_path, text, 'layout = "8 x 2 x 2"')) == whole
    assert whole.geometry.layout == "8x2x2"


@pytest.mark.parametrize("capacity, mib", [("1 GB", 953), ("3 GiB", 3072)])
def test_blocks_follow_from_a_capacity(tmp_path: Path, capacity: str, mib: int) -> None:
    path = _changed(tmp_path, "blocks_per_plane = 288", "")
    text = Path(path).read_text().replace('"64 MiB"', '"128 MiB"')
    Path(path).write_text(f'capacity = "{capacity}"\n{text}')
    config = load_config(path)
    assert config.capacity_bytes == mib * MIB
    superblock = config.geometry.superblock_bytes
    needed = config.capacity_bytes / (1 - config.ftl.over_provisioning)
    assert needed <= config.geometry.raw_bytes < needed + MIB + superblock


@pytest.mark.parametrize("name", preset_names())
def test_every_figure_of_a_preset_has_its_source_or_is_called_assumed(name: str) -> None:
    text = preset_text(name)
    figures = re.findall(r"^\w+ = [\[\d\"].*$", text, re.MULTILINE)
    assert figures
    unremarked = [line for line in figures if "#" not in line]
    head = text[: text.index("name =")]
    assert not unremarked or re.search(r"[Ff]igures with no remark|All figures assumed", head)


def test_unknown_name_lists_presets() -> None:
    with pytest.raises(ConfigRefused, match="edge-gen5"):
        load_config("no-such-drive")
    assert "tiny" in preset_names()


def test_sections_are_frozen(tmp_path: Path) -> None:
    config: DriveConfig = load_config("tiny")
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"  # type: ignore[misc]


def test_link_counts_packet_overhead() -> None:
    link = Link(
        bytes_per_s=1_000_000_000, packet_payload_bytes=128, packet_overhead_bytes=28, firmware_ns=0
    )
    assert link.transfer_ns(0) == 0
    assert link.transfer_ns(4096) == 4096 + 32 * 28
    assert link.transfer_ns(129) == 129 + 2 * 28


@pytest.mark.parametrize(
    "generation, lanes, giga", [(3, 4, 3.938), (4, 4, 7.877), (5, 4, 15.754), (5, 16, 63.015)]
)
def test_pcie_generation_and_lanes_are_a_rate(generation: int, lanes: int, giga: float) -> None:
    link = Link.model_validate(
        {
            "generation": generation,
            "lanes": lanes,
            "packet_payload_bytes": 256,
            "packet_overhead_bytes": 28,
            "firmware_ns": 0,
        }
    )
    assert link.bytes_per_s == pytest.approx(giga * 1e9, rel=2e-4)


def test_a_link_carries_less_than_its_rate_since_packets_have_headers() -> None:
    link = load_config("reference").link
    full = link.transfer_ns(1 << 30) / 1e9 * link.payload_bytes_per_s
    assert full == pytest.approx(1 << 30, rel=1e-6)


def test_nand_streams_at_the_rate_of_its_buses_or_of_its_arrays() -> None:
    edge = load_config("edge-gen5")
    assert edge.nand_bytes_per_s == 8 * 2_400_000_000  # 128 planes could read 52 GB/s
    slow = edge.timing.model_copy(update={"read_ns": (400_000,)})
    arrays = edge.model_copy(update={"timing": slow})
    assert arrays.nand_bytes_per_s == 128 * 16384 * 1_000_000_000 // 400_000


def test_virtual_clock_jumps_and_never_goes_back() -> None:
    clock = VirtualClock()
    assert clock.now_ns() == 0
    clock.advance_to(500)
    clock.advance_to(100)
    assert clock.now_ns() == 500


def test_wall_clock_is_monotonic_and_cannot_be_moved() -> None:
    clock = WallClock()
    first = clock.now_ns()
    clock.advance_to(1 << 62)
    assert first <= clock.now_ns() < 1 << 62
    assert TimeMode("virtual") is TimeMode.VIRTUAL
