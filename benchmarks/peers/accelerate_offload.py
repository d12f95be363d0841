"""transformers with accelerate's disk offload: CHECKPOINT BUDGET_BYTES TOKENS PROMPT_IDS."""

import json
import sys
from tempfile import TemporaryDirectory

import accelerate
import torch
from token_times import TokenTimes
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
        times = TokenTimes()
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                streamer=times,
            )
    return times.report(output[0, len(prompt) :].tolist(), f"accelerate {accelerate.__version__}")


if __name__ == "__main__":
    report = main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
    sys.stdout.write(report + "\n")
