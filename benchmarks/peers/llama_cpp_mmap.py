"""llama.cpp with its GGUF mapped: GGUF BUDGET_BYTES TOKENS PROMPT_IDS.

The functions of llama.cpp's C API, through bindings that bring its shared library along.
"""

import json
import sys
from importlib.metadata import version
from typing import Any

from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
from token_times import TokenTimes

MAPPED = 1  # LLAMA_LOAD_MODE_MMAP


def main(gguf: str, tokens: int, prompt: list[int]) -> str:
    ffi, llama = get_ffi(), get_lib()
    llama.llama_backend_init()
    settings = llama.llama_model_default_params()
    settings.load_mode = MAPPED
    model = llama.llama_model_load_from_file(gguf.encode(), settings)
    context = llama.llama_init_from_model(model, _context_settings(llama, len(prompt) + tokens))
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    times, found = TokenTimes(), list[int]()
    ids = prompt
    for _ in range(tokens):
        if llama.llama_decode(context, llama.llama_batch_get_one(ffi.new("int[]", ids), len(ids))):
            raise RuntimeError("llama_decode failed")
        ids = [_likeliest(ffi, llama.llama_get_logits_ith(context, -1), vocabulary)]
        found += ids
        times.note()
    return times.report(found, f"llama.cpp, llama-cpp-py-sync {version('llama-cpp-py-sync')}")


def _context_settings(llama: Any, positions: int) -> Any:
    settings = llama.llama_context_default_params()
    settings.n_ctx = max(positions, 64)
    return settings


def _likeliest(ffi: Any, logits: Any, count: int) -> int:
    values = ffi.unpack(logits, count)
    return int(values.index(max(values)))


if __name__ == "__main__":
    report = main(sys.argv[1], int(sys.argv[3]), json.loads(sys.argv[4]))
    sys.stdout.write(report + "\n")
