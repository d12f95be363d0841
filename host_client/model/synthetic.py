"""Models of any shape without their weights: blocks drawn from a few that are made of a seed.

Every block of a matrix is one of PATTERNS blocks of normally distributed values, which one is
drawn from the seed, the site and the block's place in it. So the bytes are the same each time, the
drive makes them instead of storing them (`BlockStorage.write_patterns`), and a model of 94 GB takes
neither disk nor memory. The spread is that of a fresh model of transformers (`initializer_range`),
norms are ones and biases zeroes: activations neither vanish nor explode, and the output means
nothing.
"""

import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from csd_protocol.packed import BLOCK_BYTES, VALUE_BYTES, Bits, PackedModel, Site, align_up
from host_client.model.checkpoint import Dtype, StoredLevels
from host_client.model.errors import InvalidConfig, ModelNotFound
from host_client.model.families import SiteShape, find_family
from host_client.model.foreign_configs import as_transformers

if TYPE_CHECKING:
    import torch

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]

PATTERNS = 256  # blocks, 1 MiB: what a processor's second cache holds
SEED_DEFAULT = 0
_SPREAD = 0.02  # standard deviation, where the config does not say
_LEVEL: dict[Bits, float] = {16: 1.0, 8: 80.0, 4: 8.1}  # values over words, root mean square
_SOURCE = "synthetic "  # what their source begins with; another's is a path
_SCALES: Dtype = "float16"


class SyntheticCheckpoint:
    """A `Checkpoint` whose matrices are patterns; only its vectors can be read."""

    def __init__(self, name: str, config: dict[str, Any], seed: int = SEED_DEFAULT) -> None:
        """`config` as its maker publishes it. Raises a ModelError for what does not pack."""
        self.name = name
        self.config = as_transformers(config)
        self.seed = seed
        self.dtype: Dtype = "bfloat16" if config.get("torch_dtype") == "bfloat16" else "float16"
        family = find_family(self.config, self.source)
        family.check(self.config)
        self._shapes = {
            piece.tensor: piece.shape for site in family.sites(self.config) for piece in site.pieces
        }

    @property
    def source(self) -> str:
        return f"{_SOURCE}{self.name}, seed {self.seed}"

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read_rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        assert len(self._shapes[name]) == 1, f"{name} is made by the drive"
        import torch

        make = torch.zeros if name.endswith(".bias") else torch.ones
        return make(stop - start)

    def levels(self, name: str) -> StoredLevels | None:
        return None

    def digest(self) -> str:
        text = f"synthetic {self.seed} {PATTERNS} {json.dumps(self.config, sort_keys=True)}"
        return hashlib.sha256(text.encode()).hexdigest()

    def patterns(self, bits: Bits) -> U8:
        """The blocks that matrices of so many bits are drawn from, uint8 [PATTERNS, BLOCK_BYTES].

        Below 16, where a block begins anywhere in a row, any word of it is a scale, a minimum or
        levels: so all words are scales.
        """
        rng = np.random.Generator(np.random.PCG64(self.seed))
        spread = float(self.config.get("initializer_range", _SPREAD)) / _LEVEL[bits]
        values = rng.normal(0.0, spread, (PATTERNS, BLOCK_BYTES // VALUE_BYTES))
        import torch

        kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}
        rounded = torch.from_numpy(values).to(kind[self.dtype if bits == 16 else _SCALES])
        return rounded.view(torch.uint8).numpy()

    def draw(self, site: Site) -> U16:
        """Which pattern each block of a site is [blocks]."""
        blocks = align_up(site.length_bytes, BLOCK_BYTES) // BLOCK_BYTES
        rng = np.random.Generator(np.random.PCG64([self.seed, site.site]))
        return rng.integers(0, PATTERNS, blocks, np.uint16)

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def is_drawn(shape: SiteShape) -> bool:
    """Whether a site of a synthetic model is made of patterns: all but vectors are."""
    return all(len(piece.shape) > 1 for piece in shape.pieces)


def is_synthetic(model: PackedModel) -> bool:
    """Whether a packed model is one of these."""
    return model.source.startswith(_SOURCE)


def shape_names() -> list[str]:
    """Names that `open_synthetic` knows."""
    files = resources.files("host_client.model.shapes").iterdir()
    return sorted(file.name[:-5] for file in files if file.name.endswith(".json"))


def open_synthetic(shape: str, seed: int = SEED_DEFAULT) -> SyntheticCheckpoint:
    """The model of one of `shape_names()`, or of a config.json, by the name of its folder or file.

    Raises ModelNotFound, InvalidConfig, and what families raise.
    """
    if shape in shape_names():
        text = resources.files("host_client.model.shapes").joinpath(f"{shape}.json").read_text()
        return SyntheticCheckpoint(shape, json.loads(text), seed)
    path = Path(shape).expanduser()
    if path.suffix != ".json" or not path.is_file():
        raise ModelNotFound(
            f"{shape} is no known shape ({', '.join(shape_names())}) and no config.json. "
            "Give one of these"
        )
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise InvalidConfig(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidConfig(f"{path} does not hold a JSON object")
    stem = path.resolve().parent.name if path.name == "config.json" else path.stem
    return SyntheticCheckpoint(stem.lower(), config, seed)
