"""`python -m benchmarks.full_size SHAPE`: a row of the headline table from a checkpoint on disk.

Random bfloat16 values in sharded safetensors, named and laid out as the family's own checkpoints,
packed by `csd pack` onto a drive whose media lies on the same disk with direct I/O, and run by
`csd generate --enforce` within the row's budget. The checkpoint is removed once it is packed.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from csd_protocol.units import format_size
from host_client.calibrate.headline import ROWS, Row
from host_client.cli.console import CSD
from host_client.driver import Drive
from host_client.model.packer import manifest_of
from host_client.model.synthetic import SyntheticCheckpoint, open_synthetic
from host_client.runtime.generate import GenerationReport

SHARD_BYTES = 4_900_000_000  # as large as hubs' shards are
PRESET = "edge-gen5-large"
_SPREAD = 0.02  # standard deviation, as models are initialised
_POOL_VALUES = 1 << 25  # that tensors are cut from, each at a place of its own
_DIRECT = "\n[media]\ndirect_io = true\n"


def main() -> int:
    asked = _arguments()
    out = Console(highlight=False)
    (row,) = (row for row in ROWS if row.shape == asked.shape)
    checkpoint, media = asked.folder / asked.shape, asked.folder / f"{asked.shape}.csd"
    drive = asked.folder / "drive.toml"
    asked.folder.mkdir(parents=True, exist_ok=True)
    preset = resources.files("csd_device.presets") / f"{PRESET}.toml"
    drive.write_text(preset.read_text().replace(f'"{PRESET}"', '"full-size"') + _DIRECT)
    is_new = not media.exists()
    if is_new:
        with open_synthetic(row.shape) as shape:
            write_checkpoint(shape, checkpoint)
        out.print(f"wrote {checkpoint}: {_size(checkpoint)} in shards")
    with Drive.embedded(media, drive=str(drive), time="off", start_timeout_s=300) as opened:
        at = ("--drive", opened.address)
        if is_new:
            _csd("pack", str(checkpoint), "--no-calibrate", "--bits", str(asked.bits), *at)
            shutil.rmtree(checkpoint)
        report = _generate(row, asked, at)
    assert report.enforced is not None
    out.print(
        f"{row.title}, exact, {asked.bits} bits: peak {format_size(report.enforced.peak_bytes)} of "
        f"{format_size(report.enforced.limit_bytes)} ({report.enforced.peak_bytes / 1e9:.2f} of "
        f"{report.enforced.limit_bytes / 1e9:.2f} GB), {report.tokens_per_s:.3g} tokens/s, prefill "
        f"{report.prefill_s:.1f} s, {report.staged_bytes_per_token / 1e9:.2f} GB staged a token"
    )
    if asked.json:
        asked.json.write_text(report.model_dump_json(indent=2))
    return 0


def write_checkpoint(shape: SyntheticCheckpoint, folder: Path) -> None:
    """Shards and their index, as a model of this shape is published."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(shape))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _random(name, shape.shape(name)) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    index: dict[str, Any] = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config))


def _shards(shape: SyntheticCheckpoint) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name in shape.names():
        more = 2 * torch.Size(shape.shape(name)).numel()
        if names and size + more > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


_pool: list[torch.Tensor] = []


def _random(name: str, sizes: tuple[int, ...]) -> torch.Tensor:
    """Values of a tensor: norms are 1, others are cut from one pool of normal ones."""
    if len(sizes) == 1 and "bias" not in name:
        return torch.ones(sizes, dtype=torch.bfloat16)
    if not _pool:
        dice = torch.Generator().manual_seed(0)
        _pool.append(torch.randn(_POOL_VALUES, generator=dice).mul_(_SPREAD).to(torch.bfloat16))
    count = torch.Size(sizes).numel()
    made = torch.empty(count, dtype=torch.bfloat16)
    first = hash(sizes) * 7919 + sum(name.encode()) * 104_729
    for start in range(0, count, _POOL_VALUES):
        part = made[start : start + _POOL_VALUES]
        part.copy_(torch.roll(_pool[0], -((first + start) % _POOL_VALUES))[: part.numel()])
    return made.reshape(sizes)


def _generate(row: Row, asked: argparse.Namespace, at: tuple[str, ...]) -> GenerationReport:
    with open_synthetic(row.shape) as shape:
        budget = row.budget_bytes(manifest_of(shape, shape.name), asked.bits)
    words = (
        *("generate", row.shape, *at, "--dram", str(budget), "--enforce", "--json"),
        *("--prompt-tokens", str(asked.prompt_tokens), "--max-new-tokens", str(asked.tokens)),
    )
    return GenerationReport.model_validate_json(_csd(*words))


def _csd(*arguments: str) -> str:
    words = [sys.executable, *CSD, *arguments]
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout


def _size(folder: Path) -> str:
    return format_size(sum(file.stat().st_size for file in folder.iterdir()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.full_size", description=__doc__)
    parser.add_argument("shape", choices=[row.shape for row in ROWS])
    parser.add_argument("--bits", type=int, choices=(16, 12, 8, 4), default=16)
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/flash-csd-full-size"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
