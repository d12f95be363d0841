"""`csd table --measure` on a tiny shape: planned by its config, packed, and held to its budget."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from host_client.cli.app import app
from host_client.runtime.cgroup import Hierarchy, NoCgroup
from host_client.runtime.memory_limit import allowed

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 600,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config.json, and a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "small.json"
    path.write_text(json.dumps(CONFIG))
    return path


def _table(shape: Path, *options: str) -> Any:
    words = ["table", "--rows", str(shape), "--preset", "tiny", "--host-rate", "20GB", *options]
    ended = CliRunner().invoke(app, [*words, "--tokens", "8", "--json"], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    (row,) = json.loads(ended.stdout)
    return row


def _by_class(modelled: dict[str, Any]) -> dict[str, float]:
    return {time["drive"]: time["tokens_per_s"] for time in modelled["modelled"]}


def test_without_measuring_the_config_is_enough(shape: Path) -> None:
    row = _table(shape)
    assert (row["model"], row["title"], row["bits"], row["measured"]) == ("small", "small", 16, [])
    exact, active = row["modelled"]
    assert (exact["quality"], active["quality"]) == ("exact", "0.1")
    assert set(_by_class(exact)) == {"cloud", "edge", "end"}


def test_a_row_is_held_to_its_budget_and_stages_what_was_planned(
    shape: Path, tmp_path: Path, hierarchy: Hierarchy
) -> None:
    row = _table(shape, "--measure", "--exact")
    exact, active = row["measured"]
    budget = row["plan"]["dram_budget_bytes"]
    for run in (exact, active):
        assert run["failure"] is None
        assert run["budget_bytes"] == run["report"]["dram_budget_bytes"] == budget
        enforced = run["report"]["enforced"]
        assert enforced["peak_bytes"] <= enforced["limit_bytes"]
        assert enforced["limit_bytes"] == budget + allowed(enforced["start_bytes"], budget)
    # The first token fetched a third of the second, and nothing is fetched behind the last.
    planned = row["plan"]["staged_bytes_per_token"]
    assert exact["report"]["staged_bytes_per_token"] == pytest.approx(planned, rel=0.06)
    expected = row["modelled"][1]["staged_bytes_per_token"]
    assert active["report"]["staged_bytes_per_token"] == pytest.approx(expected, rel=0.25)
    assert not list((tmp_path / "cache" / "csd").iterdir())


def test_without_control_groups_it_says_so_and_uses_the_media_that_is_there(
    shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> Hierarchy:
        raise NoCgroup("none here")

    monkeypatch.setattr(Hierarchy, "find", none)
    asked = ("--measure", "--media", str(tmp_path / "media"), "--bits", "8")
    (first,) = _table(shape, *asked)["measured"]
    (again,) = _table(shape, *asked)["measured"]
    assert first["report"]["enforced"] is None
    assert first["report"]["host_peak_rss_bytes"] > 0
    assert again["report"]["token_ids"] == first["report"]["token_ids"]
    assert [folder.name for folder in (tmp_path / "media").iterdir()] == ["small-8bit-0.1.csd"]


def test_a_row_that_fails_says_why_and_the_command_with_it(shape: Path, tmp_path: Path) -> None:
    to = tmp_path / "table.json"
    words = ["table", "--rows", str(shape), "--measure", "--preset", "no-such", "--to", str(to)]
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 5
    (row,) = json.loads(to.read_text())
    (run,) = row["measured"]
    assert run["report"] is None
    assert "no-such" in run["failure"]
