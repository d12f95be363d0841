"""Speed as ratios: ours over something real, measured in the same run.

A benchmark is a module with `run(tiny: bool) -> list[Ratio]`, named in `BENCHMARKS` of
`__main__.py`; `tiny` takes a second or two and is what the tests run.
"""
