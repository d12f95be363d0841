"""Side by side with other runtimes, at a tiny size: the same values for all of them."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.peers import checkpoint, ours, race
from benchmarks.peers import course as course_module
from benchmarks.peers.checkpoint import SHAPES, make_checkpoint, make_gguf, prompt_ids
from benchmarks.peers.course import Course
from csd_protocol.units import MIB
from host_client.model.formats import open_checkpoint
from host_client.model.source import resolve_source
from host_client.runtime.cgroup import Hierarchy

TINY = SHAPES["tiny"]
BUDGET = 4 * MIB
OTHERS = [*ours.WAYS[1:], ours.FOUR_BITS]


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    folder = make_checkpoint(tmp_path_factory.mktemp("peers") / "llama-tiny", TINY)
    return Course(
        checkpoint=folder,
        gguf=make_gguf(folder, TINY),
        bits=16,
        budget_bytes=BUDGET,
        limit_bytes=BUDGET + (1 << 30),
        prompt=prompt_ids(5),
        tokens=4,
        python=Path(sys.executable),
        node_modules=folder / "none",
    )


def test_the_gguf_holds_the_values_of_the_folder(course: Course) -> None:
    with (
        open_checkpoint(resolve_source(str(course.checkpoint))) as ours,
        open_checkpoint(resolve_source(str(course.gguf))) as theirs,
    ):
        assert sorted(ours.names()) == sorted(theirs.names())
        for name in ours.names():
            rows = ours.shape(name)[0]
            read = theirs.read_rows(name, 0, rows)
            assert torch.equal(ours.read_rows(name, 0, rows).float(), read.float()), name


def test_at_4_bits_it_holds_the_nearest_levels(course: Course) -> None:
    with (
        open_checkpoint(resolve_source(str(course.checkpoint))) as ours,
        open_checkpoint(resolve_source(str(make_gguf(course.checkpoint, TINY, 4)))) as theirs,
    ):
        for name in ours.names():
            rows = ours.shape(name)[0]
            values = ours.read_rows(name, 0, rows).float()
            off = (values - theirs.read_rows(name, 0, rows).float()).abs().max()
            assert off <= values.abs().max() / 7, name


def test_the_sizes_are_those_of_the_files(course: Course) -> None:
    files = sum(file.stat().st_size for file in course.checkpoint.glob("*.safetensors"))
    assert 0 <= files - checkpoint.weights_bytes(TINY) < 64 << 10  # headers


def test_a_peer_that_is_not_installed_is_left_out_with_its_reason(course: Course) -> None:
    (finish,) = race.race(course, ["llama.cpp"])
    assert finish.failure is not None
    assert "node-llama-cpp is not installed" in finish.failure


@pytest.mark.parametrize("way", OTHERS if "CSD_FULL" in os.environ else OTHERS[-2:-1])
def test_every_way_of_ours_runs(
    course: Course, hierarchy: Hierarchy, monkeypatch: pytest.MonkeyPatch, way: ours.Way
) -> None:
    monkeypatch.setattr(course_module, "drop_caches", lambda: None)
    monkeypatch.setattr(ours, "drop_caches", lambda: None)
    if way.bits == 4:
        course = replace(course, gguf=make_gguf(course.checkpoint, TINY, 4), bits=4)
    (finish,) = race.race(course, [way.name])
    assert finish.failure is None
    assert len(finish.token_ids) == course.tokens
    assert finish.drive_peak_bytes is not None


def test_ours_and_disk_offload_say_the_same_first_token(
    course: Course, hierarchy: Hierarchy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (course_module, ours):
        monkeypatch.setattr(module, "drop_caches", lambda: None)
    own, theirs = race.race(course, ["flash-csd", "accelerate"])
    assert own.failure is None
    assert theirs.failure is None
    assert len(own.token_ids) == len(theirs.token_ids) == course.tokens
    assert own.token_ids[0] == theirs.token_ids[0]  # later ones are decided by 16-bit arithmetic
    for finish in (own, theirs):
        assert finish.tokens_per_s is not None
        assert finish.tokens_per_s > 0
        assert finish.peak_bytes is not None
        assert 0 < finish.peak_bytes <= finish.limit_bytes
    assert own.drive_peak_bytes is not None
    assert own.drive_limit_bytes is not None
    assert 0 < own.drive_peak_bytes <= own.drive_limit_bytes
