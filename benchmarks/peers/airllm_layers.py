"""AirLLM, a layer at a time from its own files: CHECKPOINT BUDGET_BYTES TOKENS PROMPT_IDS.

With TOKENS 0 it only splits the checkpoint, which it does once and keeps beside it.
"""

import json
import sys
from contextlib import redirect_stdout
from importlib.metadata import version

import torch
from airllm import AutoModel
from greedy import generate


def main(checkpoint: str, tokens: int, prompt: list[int]) -> str:
    with redirect_stdout(sys.stderr):
        model = AutoModel.from_pretrained(checkpoint, device="cpu", dtype=torch.bfloat16)
        if not tokens:
            return ""
        return generate(model, tokens, prompt, f"AirLLM {version('airllm')}")


if __name__ == "__main__":
    report = main(sys.argv[1], int(sys.argv[3]), json.loads(sys.argv[4]))
    sys.stdout.write(report + "\n")
