"""What is freed is kept, so that the next batch finds its pages where the one before left them."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from experiments.memory import keep_freed
if sys.argv[1] == "kept":
    keep_freed()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):  # 64 MiB, more than glibc ever keeps unasked; an aligned block finds its place in a few rounds
    torch.ones(2**24)
before = faults()
for _ in range(10):
    torch.ones(2**24)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose malloc is what keep_freed sets")
def test_memory_that_was_freed_is_not_cleared_again() -> None:
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "returned")
    )
    assert kept < 100
    assert returned > 1000  # measured: 0, and 160,000, or 5,400 with huge pages
