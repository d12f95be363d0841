"""Models on disk and on a drive: checkpoint readers, families, the packer, the drive's catalog.

    source = resolve_source("smollm2-135m")             # source.py; or a folder, or a .gguf file
    with open_checkpoint(source) as checkpoint:         # formats.py
        model = pack(checkpoint, drive, source.name)    # packer.py
    model_id, model = open_model(drive, source.name)    # catalog.py

What is wrong with a model is a `ModelError` (errors.py), whose message says what, where, and what
to do. Only readers and packer import torch; catalog and errors are light.
"""
