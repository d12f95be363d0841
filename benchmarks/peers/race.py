"""One peer at a time: caches cold, in a control group with the limit that all of them get."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.peers.course import (
    PREPARATION_S,
    TIMEOUT_S,
    Course,
    Finish,
    PeerFailed,
    Runner,
    disk_rate,
    limited,
    said,
)
from benchmarks.peers.ours import FOUR_BITS, WAYS
from csd_protocol.packed import Bits

HERE = Path(__file__).parent


def driven(name: str, script: str, of: Callable[[Course], Path], splits: bool = False) -> Runner:
    """A peer behind a driver. `splits`: it lays files of its own down first, unmeasured."""

    def run(course: Course) -> Finish:
        os.environ["PEERS_NODE_MODULES"] = str(course.node_modules)
        arguments = [str(of(course)), str(course.budget_bytes)]
        if splits:
            said(_words(course, script, arguments, 0), PREPARATION_S)
        words = _words(course, script, arguments, course.tokens)
        with limited(course.limit_bytes, "-peer") as group:
            told = json.loads(said(group.command(words), TIMEOUT_S, group).splitlines()[-1])
            seconds = told["token_s"]
            return Finish(
                peer=name,
                limit_bytes=course.limit_bytes,
                peak_bytes=group.peak_bytes,
                tokens_per_s=len(seconds) / sum(seconds),
                **told,
            )

    return run


def _words(course: Course, script: str, arguments: list[str], tokens: int) -> list[str]:
    """The command line of a driver. Raises PeerFailed where it cannot run."""
    ids = json.dumps(course.prompt)
    interpreter: Path | str = course.python
    if script.endswith(".mjs"):
        if not (course.node_modules / "node-llama-cpp").is_dir():
            raise PeerFailed(f"node-llama-cpp is not installed in {course.node_modules}")
        interpreter = "node"
    return [str(interpreter), str(HERE / script), *arguments, str(tokens), ids]


_LLAMA_CPP = driven("llama.cpp", "llama_cpp_mmap.mjs", lambda it: it.gguf)
PEERS: dict[Bits, dict[str, Runner]] = {  # by the bits of the GGUF's weights
    16: {
        **{way.name: way.run for way in WAYS},
        "accelerate": driven("accelerate", "accelerate_offload.py", lambda it: it.checkpoint),
        "airllm": driven("airllm", "airllm_layers.py", lambda it: it.checkpoint, splits=True),
        "llama.cpp": _LLAMA_CPP,
    },
    4: {FOUR_BITS.name: FOUR_BITS.run, "llama.cpp": _LLAMA_CPP},
}


def race(course: Course, names: list[str]) -> Iterator[Finish]:
    """Each peer's result as it is there."""
    peers = PEERS[course.bits]
    for name in names:
        try:
            before = disk_rate(course.gguf)
            finish = peers[name](course)
            rate = (before + disk_rate(course.gguf)) / 2
            yield finish.model_copy(update={"disk_bytes_per_s": rate})
        except PeerFailed as error:
            yield Finish(peer=name, failure=str(error), limit_bytes=course.limit_bytes)
