"""The benchmarks run at their tiny size: what counts here is that there are figures."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import window_reads
from benchmarks.ratio import Ratio


def run_tiny(name: str, tmp_path: Path) -> list[dict]:
    written = tmp_path / "bench.json"
    assert benchmarks.main(["--tiny", "--json", str(written), name]) == 0
    said = json.loads(written.read_text())
    assert said["tiny"] is True
    return said["ratios"]


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_each_writes_its_ratios(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ratios = run_tiny(name, tmp_path)
    assert ratios
    for ratio in ratios:
        assert ratio["ours"] > 0
        assert ratio["reference"] > 0
        assert ratio["ratio"] == pytest.approx(ratio["ours"] / ratio["reference"])
        assert ratio["met"] == (ratio["ratio"] >= ratio["floor"])
        assert ratio["against"]
    assert "ours over the reference" in capsys.readouterr().out


def test_without_fio_reads_are_compared_with_preadv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    ratios = window_reads.run(tiny=True)
    assert {ratio.against for ratio in ratios} == {"preadv, one thread (no fio here)"}


def test_a_ratio_below_its_floor_is_not_met_and_fails_a_full_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = Ratio("x", ours=8.9, reference=10.0, unit="GB/s", floor=0.9, against="y")
    assert not slow.met
    assert Ratio("x", ours=9.0, reference=10.0, unit="GB/s", floor=0.9, against="y").met
    monkeypatch.setattr(window_reads, "run", lambda tiny: [slow])
    assert benchmarks.main(["window_reads"]) == 1
    assert benchmarks.main(["window_reads", "--tiny"]) == 0


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        benchmarks.main(["nothing"])
    assert caught.value.code == 2
    assert "no benchmark nothing" in capsys.readouterr().err
