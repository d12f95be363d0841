"""fio job files: what is understood, in fio's units, and what is refused by name."""

import pytest

from csd_device.workload.fio_job import parse_fio
from csd_device.workload.patterns import Job, WorkloadRefused

FILE = """
; a comment
[global]
ioengine=libaio
direct=1
bs=16k
size=1g

[warm]
rw=write
bs = 1m
number_ios=500

[reads]
stonewall
rw=randread
iodepth=64
runtime=30
time_based
offset=4k

[mix]
readwrite=randrw
rwmixread=70
numjobs=2
io_size=160k
random_distribution=zipf:1.1
randseed=9
group_reporting
"""


def test_sections_become_jobs_in_groups() -> None:
    found = parse_fio(FILE, "x.fio", seed=5)
    gib, kib = 1 << 30, 1 << 10
    assert found.groups == [
        [Job("warm", 0.0, False, 1 << 20, 1, 0, gib, requests=500, seed=5)],
        [
            Job("reads", 1.0, True, 16 * kib, 64, 4 * kib, gib, None, 30 * 10**9, seed=6),
            Job("mix.0", 0.7, True, 16 * kib, 1, 0, gib, 10, zipf_theta=1.1, seed=9),
            Job("mix.1", 0.7, True, 16 * kib, 1, 0, gib, 10, zipf_theta=1.1, seed=10),
        ],
    ]
    assert found.ignored == ["ioengine", "direct", "group_reporting"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("thinktime=10", r"x.fio:4: thinktime is not understood"),
        ("bssplit=4k/50", "bssplit is not understood"),
        ("rw=trim", r"x.fio \[job\]: rw is trim; there are read, write"),
        ("bs=4ki", "bs is '4ki'; write a number and one of"),
        ("rwmixread=120", "rwmixread 120 %|rwmixread is 120 %"),
        ("iodepth=many", "iodepth is 'many', which is no number"),
        ("random_distribution=pareto:0.9", "random and zipf:theta"),
        ("time_based", "time_based needs runtime"),
        ("runtime=1w", "runtime is '1w'"),
    ],
)
def test_refusals_name_section_and_key(line: str, message: str) -> None:
    text = f"[job]\nrw=randrw\nsize=1m\n{line}\n"
    with pytest.raises(WorkloadRefused, match=message):
        parse_fio(text, "x.fio", 1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no job section"),
        ("rw=read\n", "before any section"),
        ("[job]\nrw=read\n", "it has no end"),
    ],
)
def test_files_without_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(WorkloadRefused, match=message):
        parse_fio(text, "x.fio", 1)
