"""transformers with accelerate's disk offload: CHECKPOINT BUDGET_BYTES TOKENS PROMPT_IDS."""

import json
import sys
from tempfile import TemporaryDirectory

import accelerate
import torch
from greedy import generate
from transformers import AutoModelForCausalLM


def main(checkpoint: str, budget_bytes: int, tokens: int, prompt: list[int]) -> str:
    with TemporaryDirectory(prefix="csd-offload-") as folder:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=torch.bfloat16,
            device_map="auto",
            max_memory={"cpu": budget_bytes},
            offload_folder=folder,
        )
        return generate(model, tokens, prompt, f"accelerate {accelerate.__version__}")


if __name__ == "__main__":
    report = main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
    sys.stdout.write(report + "\n")
