"""What is freed stays with the process that trains, unless the user says otherwise."""

import os
import subprocess
import sys

import pytest

# Pages that a buffer costs which is taken, filled and freed for the second time.
PROGRAM = """
import ctypes, resource
{first}
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer = ctypes.c_void_p(library.malloc(100 << 20))
    ctypes.memset(buffer, 1, 100 << 20)
    library.free(buffer)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(first, **environment):
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(first=first)],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_what_is_freed_is_kept_for_the_next_step():
    assert page_faults("import gpt_tf") < 100
    # Else this test says nothing.
    assert page_faults("") > 1000
    assert page_faults("import gpt_tf", MALLOC_ARENA_MAX="4") > 1000
