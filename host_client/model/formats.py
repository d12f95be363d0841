"""Which reader a checkpoint on disk needs."""

from host_client.model.checkpoint import Checkpoint
from host_client.model.gguf_file import GgufFile
from host_client.model.safetensors_folder import SafetensorsFolder
from host_client.model.source import Source


def open_checkpoint(source: Source) -> Checkpoint:
    """The reader for a source's format. Raises a ModelError when its files are not right."""
    if source.format == "gguf":
        return GgufFile(source.path)
    return SafetensorsFolder(source.path)
