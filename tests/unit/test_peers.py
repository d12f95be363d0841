"""Side by side with other runtimes, at a tiny size: the same values for all of them."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.peers import checkpoint, race
from benchmarks.peers.checkpoint import SHAPES, make_checkpoint, make_gguf, prompt_ids
from csd_protocol.units import MIB
from host_client.model.formats import open_checkpoint
from host_client.model.source import resolve_source
from host_client.runtime.cgroup import Hierarchy

TINY = SHAPES["tiny"]
BUDGET = 4 * MIB


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> race.Course:
    folder = make_checkpoint(tmp_path_factory.mktemp("peers") / "llama-tiny", TINY)
    return race.Course(
        checkpoint=folder,
        gguf=make_gguf(folder, TINY),
        budget_bytes=BUDGET,
        limit_bytes=BUDGET + (1 << 30),
        prompt=prompt_ids(5),
        tokens=4,
        python=Path(sys.executable),
        node_modules=folder / "none",
    )


def test_the_gguf_holds_the_values_of_the_folder(course: race.Course) -> None:
    with (
        open_checkpoint(resolve_source(str(course.checkpoint))) as ours,
        open_checkpoint(resolve_source(str(course.gguf))) as theirs,
    ):
        assert sorted(ours.names()) == sorted(theirs.names())
        for name in ours.names():
            rows = ours.shape(name)[0]
            read = theirs.read_rows(name, 0, rows)
            assert torch.equal(ours.read_rows(name, 0, rows).float(), read.float()), name


def test_the_sizes_are_those_of_the_files(course: race.Course) -> None:
    files = sum(file.stat().st_size for file in course.checkpoint.glob("*.safetensors"))
    assert 0 <= files - checkpoint.weights_bytes(TINY) < 64 << 10  # headers


def test_a_peer_that_is_not_installed_is_left_out_with_its_reason(course: race.Course) -> None:
    (finish,) = race.race(course, ["llama.cpp"])
    assert finish.failure is not None
    assert "node-llama-cpp is not installed" in finish.failure


def test_ours_and_disk_offload_say_the_same_first_token(
    course: race.Course, hierarchy: Hierarchy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "drop_caches", lambda: None)
    ours, theirs = race.race(course, ["flash-csd", "accelerate"])
    assert ours.failure is None
    assert theirs.failure is None
    assert len(ours.token_ids) == len(theirs.token_ids) == course.tokens
    assert ours.token_ids[0] == theirs.token_ids[0]  # later ones are decided by 16-bit arithmetic
    for finish in (ours, theirs):
        assert finish.tokens_per_s is not None
        assert finish.tokens_per_s > 0
        assert finish.peak_bytes is not None
        assert 0 < finish.peak_bytes <= finish.limit_bytes
    assert ours.drive_peak_bytes is not None
    assert ours.drive_limit_bytes is not None
    assert 0 < ours.drive_peak_bytes <= ours.drive_limit_bytes
