"""`csd`, started as often as asked: each run is a process of its own, forked after the imports.

Importing torch and transformers takes seconds, a run that is refused milliseconds. Requests come as
lines of JSON on standard input, answers go to standard output:

    {"start": arguments, "stdout": path, "stderr": path, "environment": {...}}  ->  process id
    {"wait": process id}                                     ->  exit status, -signal when killed

What a run does is what the script `csd` does, from its arguments to the interpreter's end.
"""

import json
import os
import sys
from typing import Any

from transformers.models.llama import modeling_llama  # noqa: F401 - `generate` does so on first use

from host_client.cli.app import main


def serve() -> dict[str, Any] | None:
    """Answers requests; returns None at their end, and in each forked process its request."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer(os.waitstatus_to_exitcode(status))
            continue
        process = os.fork()
        if process == 0:
            return request
        answer(process)
    return None


def answer(value: int) -> None:
    sys.stdout.write(f"{value}\n")
    sys.stdout.flush()


def become(request: dict[str, Any]) -> None:
    """Arguments, environment and files of a run of its own."""
    sys.argv = ["csd", *request["start"]]
    os.environ.update(request["environment"])
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        target = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, descriptor)
        os.close(target)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)


if (asked := serve()) is not None:
    become(asked)
    main()
