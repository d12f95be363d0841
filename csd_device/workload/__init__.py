"""Workloads: request patterns, fio job files and block traces, played against a drive in-process.

Everything runs in virtual time: a request's latency is what the model says, and no run waits. A
closed loop keeps `depth` requests of each job under way; a trace's requests arrive when it says.
"""
