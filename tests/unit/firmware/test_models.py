"""Models as hosts may have written them: what does not hold together is No Such Packed Model."""

import json

import pytest

from csd_device.firmware import commands as c
from csd_protocol.packed import (
    MODELS_OFFSET_BYTES,
    Directory,
    Extent,
    decode_directory,
    directory_slot,
    encode_directory,
    encode_manifest,
)
from csd_protocol.status import Status


def stage(host) -> c.Completion:
    return host.run(c.Stage(1, (c.Target(0, c.What.ALL),)))


def padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 4096) * 4096, b"\0")


def write_entry(host, packed, **changes) -> None:
    """The directory again, its first entry changed."""
    data = next(data for offset, data in packed.writes if offset == directory_slot(1))
    first, *others = decode_directory([data, b""]).models
    directory = Directory(generation=3, models=(first.model_copy(update=changes), *others))
    host.write(directory_slot(3), padded(encode_directory(directory)))


@pytest.mark.parametrize(
    "changes, detail",
    [
        ({"manifest": Extent(offset_bytes=MODELS_OFFSET_BYTES, length_bytes=1 << 30)}, "most"),
        ({"manifest": Extent(offset_bytes=1 << 50, length_bytes=4096)}, "beyond the namespace"),
        ({"manifest": Extent(offset_bytes=1 << 29, length_bytes=4096)}, "magic missing"),
        ({"extent": Extent(offset_bytes=MODELS_OFFSET_BYTES, length_bytes=4096)}, "outside"),
    ],
)
def test_a_directory_that_points_elsewhere(staged_host, packed, changes, detail):
    write_entry(staged_host, packed, **changes)
    failed = stage(staged_host)
    assert failed.status is Status.NO_MODEL
    assert detail in failed.detail
    write_entry(staged_host, packed)
    assert stage(staged_host).status is Status.SUCCESS


def test_a_torn_directory_and_a_torn_manifest(staged_host, packed):
    staged_host.write(directory_slot(1), b"CSDMODEL" + bytes(4088))
    failed = stage(staged_host)
    assert failed.status is Status.NO_MODEL
    assert "directory slot 1" in failed.detail
    write_entry(staged_host, packed)
    manifest = bytearray(padded(encode_manifest(packed.manifest)))
    manifest[300] ^= 1
    staged_host.write(MODELS_OFFSET_BYTES, bytes(manifest))
    failed = stage(staged_host)
    assert failed.status is Status.NO_MODEL
    assert "torn or damaged" in failed.detail


def test_tables_are_refused_without_dram_and_load_once_there_is_some(staged_host):
    dram = json.loads(staged_host.ok(c.Identify(0xC0)).result.data)["dram"]
    assert "model.1" not in dram
    filling = dram["free"] - 100
    staged_host.ok(c.LoadProgram(1, filling, 0, b"x"))
    failed = stage(staged_host)
    assert failed.status is Status.DRAM_EXCEEDED
    assert "model.1" in failed.detail
    assert staged_host.run(c.LoadProgram(1, filling, 9, b"x")).status is Status.SEQUENCE_ERROR
    assert stage(staged_host).status is Status.SUCCESS
