"""The machine that measures: its processor, the rate of its memory, and its energy.

A GPT that generates one text reads every weight for every token, so its speed follows
the rate at which memory is read. That is measured here with NumPy alone, in seconds, so
that a device can do it. It is a yardstick: a loop in C was seen to read twice as fast.

Energy comes from RAPL, the processors' own counters, where Linux shows them and lets
this user read them; elsewhere it is unknown.
"""

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from gpt_tf.settings import arguments

POWERCAP = "/sys/class/powercap"

# Together the threads read more than a cache holds, if memory is not scarce.
_LARGEST_ARRAY_BYTES = 256 << 20
_SHARE_OF_MEMORY = 8
_FEWEST_PASSES = 3
_MOST_SECONDS = 3600

_VECTORS = ("avx512f", "avx2", "avx", "sve2", "sve", "asimd", "neon")


def describe_machine(*, seconds: float = 2.0) -> dict:
    """Say what this machine is, and measure how fast it reads memory.

    Args:
        seconds: What measuring may take in total; 0 leaves the measuring out.

    Returns:
        `cpu` (its name and widest vectors), `cores` that this process may use,
        `physical_cores` of them, `memory_bytes`, `os`, `python`, and
        `read_bytes_per_s` by number of threads, `{"1": ..., "2": ...}`, or None.

    Example:
        >>> describe_machine()["read_bytes_per_s"]["1"]
    """
    cores, rates = usable_cores(), None
    if arguments.number("seconds", seconds, least=0, most=_MOST_SECONDS):
        counts = thread_counts()
        share = seconds / len(counts)
        rates = {str(n): measure_read_rate(n, seconds=share) for n in counts}
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "physical_cores": min(psutil.cpu_count(logical=False) or cores, cores),
        "memory_bytes": psutil.virtual_memory().total,
        "os": platform.platform(),
        "python": platform.python_version(),
        "read_bytes_per_s": rates,
    }


def usable_cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(psutil.Process().cpu_affinity())
    except AttributeError:  # not on macOS
        return psutil.cpu_count() or 1


def thread_counts() -> list[int]:
    """Return numbers of threads worth measuring: powers of two, and all cores."""
    cores = usable_cores()
    return sorted({*(2**n for n in range(cores.bit_length())), cores})


def measure_read_rate(threads: int = 1, *, seconds: float = 1.0) -> float:
    """Measure how many bytes per second threads together read from memory.

    Each reads its part of one large array; the best of several passes counts, since
    others on the machine can only take from it.

    Args:
        threads: How many, at least 1.
        seconds: About how long to measure; at least three passes are made.
    """
    threads = arguments.integer("threads", threads, 1, arguments.MOST_THREADS)
    seconds = arguments.number("seconds", seconds, least=0, most=_MOST_SECONDS)
    deadline = time.perf_counter() + seconds
    memory = psutil.virtual_memory().total
    size = min(_LARGEST_ARRAY_BYTES, memory // _SHARE_OF_MEMORY)
    # Of NumPy's reductions, which leave Python's lock, `or` is the one that waits
    # for memory most: a sum of float64 was half as fast.
    parts = np.array_split(np.ones(size // 8, np.uint64), threads)
    best, passes = float("inf"), 0
    with ThreadPoolExecutor(threads) as pool:
        while passes < _FEWEST_PASSES or time.perf_counter() < deadline:
            began = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = min(best, time.perf_counter() - began)
            passes += 1
    return sum(part.nbytes for part in parts) / best


def peak_memory_bytes() -> int | None:
    """Return the most memory that this process has had resident; None if not on Linux.

    `ru_maxrss` will not do: it also knows that of the process that started this one.
    """
    for line in _content("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return None


class EnergyMeter:
    """Joules that the processors have used since it was made, by RAPL's counters.

    It counts whole processors, and their memory where that has a counter: everything
    that runs on the machine meanwhile, idle power included.

    Args:
        folder: Where the counters lie, `intel-rapl:0` and so on (AMD's, too).

    Reference: Linux, Documentation/power/powercap/powercap.rst.
    """

    def __init__(self, folder: str | os.PathLike = POWERCAP):
        self._zones = []
        for zone in sorted(Path(folder).glob("intel-rapl:*")):
            # `psys` contains the processors, and a processor its cores; memory is
            # apart.
            is_part = zone.name.count(":") > 1
            if _content(zone / "name").startswith("dram" if is_part else "package"):
                self._zones.append(zone)
        self._before = self._read("energy_uj")

    def joules(self) -> float | None:
        """Return what was used, or None where the machine does not tell.

        A counter may have begun again once, not oftener.
        """
        after, ranges = self._read("energy_uj"), self._read("max_energy_range_uj")
        if not (self._before and after and ranges):
            return None
        counts = zip(self._before, after, ranges, strict=True)
        return sum((now - before) % range_ for before, now, range_ in counts) / 1e6

    def _read(self, name):
        """Return a number of each zone; of none where one cannot be read."""
        try:
            return [int(_content(zone / name)) for zone in self._zones]
        except ValueError:
            return []


def _content(file):
    """Return the text of a file, nothing where it cannot be read."""
    try:
        return Path(file).read_text("utf-8")
    except OSError:
        return ""


def _cpu_name(cpuinfo="/proc/cpuinfo"):
    """Return the processor's name, and its widest vectors."""
    facts = {}
    for line in _content(cpuinfo).splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip().lower(), value.strip())
    # On ARM the flags are called features, and the name is often missing.
    name = facts.get("model name") or facts.get("hardware") or platform.processor()
    flags = facts.get("flags", facts.get("features", "")).split()
    vectors = next((vector for vector in _VECTORS if vector in flags), "")
    return f"{name or platform.machine()} {vectors}".strip()
