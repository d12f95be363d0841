"""Nothing grows with the tokens that a model has generated."""

import gc
from pathlib import Path

NAME = "tied"
ROUNDS, NEW_TOKENS = 50, 40
GROWTH_BYTES_MAX = 1 << 20  # over 1,600 tokens; 12 KiB were seen


def resident_bytes() -> int:
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


def test_two_thousand_tokens_leave_memory_leases_and_files_as_they_were(
    lab, tokens_of, greedy, process_state
) -> None:
    model = lab.open(NAME, lab.budget(NAME, 0.3))
    ids = tokens_of(lab, NAME, 6)
    first = greedy(model, ids, new=NEW_TOKENS)
    states, memory = set(), []
    for number in range(1, ROUNDS):
        assert greedy(model, ids, new=NEW_TOKENS) == first
        model.csd.engine.abandon()  # what was asked for ahead of the next token
        assert lab.leases == 0
        if number >= ROUNDS // 5:  # libraries have what they keep
            states.add(process_state())
        if number in (ROUNDS // 5, ROUNDS - 1):
            memory.append(resident_bytes())
    assert len(states) == 1
    assert memory[1] - memory[0] < GROWTH_BYTES_MAX
