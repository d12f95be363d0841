"""When tokens came and what had been read from disks by then; shared by the drivers.

A streamer for transformers' `generate` (`put`, `end`), of which the first call brings the prompt.
"""

import json
import time
from pathlib import Path


def read_bytes() -> int:
    """What the kernel has fetched from disks for this process, page faults included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


class TokenTimes:
    def __init__(self) -> None:
        self._times_s: list[float] = []
        self._read_bytes: list[int] = []
        self._has_prompt = False
        self._loaded_s = time.perf_counter()

    def put(self, value: object) -> None:
        if self._has_prompt:
            self.note()
        self._has_prompt = True

    def end(self) -> None:
        pass

    def note(self) -> None:
        """A token has come."""
        self._times_s.append(time.perf_counter())
        self._read_bytes.append(read_bytes())

    def report(self, token_ids: list[int], version: str) -> str:
        """One line of JSON for `benchmarks.peers.race`."""
        decoded = len(self._times_s) - 1
        return json.dumps(
            {
                "version": version,
                "token_ids": token_ids,
                "prefill_s": self._times_s[0] - self._loaded_s,
                "token_s": [
                    later - earlier
                    for earlier, later in zip(self._times_s, self._times_s[1:], strict=False)
                ],
                "read_bytes_per_token": (self._read_bytes[-1] - self._read_bytes[0]) / decoded,
            }
        )
