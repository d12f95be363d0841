"""Side by side: this project and what people use today, on one checkpoint under one memory limit.

`python -m benchmarks.peers` (`make bench-peers`). Each peer is a small driver, a process of its own
in a control group of its own; a driver imports nothing of this project, since peers are installed
in an environment of their own (`constraints.txt`).
"""
