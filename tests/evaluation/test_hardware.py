import itertools
import platform
import subprocess
import sys

import numpy as np
import pytest

from gpt_tf.evaluation import hardware


def test_a_machine_is_described_and_its_memory_measured(monkeypatch):
    monkeypatch.setattr(hardware, "_LARGEST_ARRAY_BYTES", 1 << 20)
    monkeypatch.setattr(hardware, "usable_cores", lambda: 3)
    found = hardware.describe_machine(seconds=0.03)
    assert set(found) == {
        *("cpu", "cores", "physical_cores", "memory_bytes", "os", "python"),
        "read_bytes_per_s",
    }
    assert found["cores"] == 3 and found["memory_bytes"] > 1 << 28
    assert list(found["read_bytes_per_s"]) == ["1", "2", "3"]
    assert all(rate > 0 for rate in found["read_bytes_per_s"].values())
    assert hardware.describe_machine(seconds=0)["read_bytes_per_s"] is None


def test_numbers_of_threads_are_powers_of_two_and_all_cores(monkeypatch):
    for cores, counts in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])):
        monkeypatch.setattr(hardware, "usable_cores", lambda n=cores: n)
        assert hardware.thread_counts() == counts


@pytest.mark.parametrize("threads", [1, 3])
def test_the_read_rate_is_all_bytes_over_the_best_pass(monkeypatch, threads):
    """Passes of 4, 2 and 8 seconds: the best one counts, and every byte does."""
    monkeypatch.setattr(hardware, "_LARGEST_ARRAY_BYTES", 8 << 10)
    moments = itertools.chain([0, 10, 14, 20, 22, 30, 38], itertools.repeat(99))
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(moments))
    assert hardware.measure_read_rate(threads, seconds=0.0) == (8 << 10) / 2


def test_the_peak_memory_is_the_process_own():
    """What it allocates counts; what the process that started it has, does not."""
    code = (
        "import numpy as np; from gpt_tf.evaluation.hardware import peak_memory_bytes\n"
        "print(peak_memory_bytes()); np.ones(8 << 20); np.empty(64 << 20)\n"
        "print(peak_memory_bytes())"
    )
    ballast = np.ones(32 << 20)
    assert hardware.peak_memory_bytes() > ballast.nbytes
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    before, after = map(int, found.stdout.split())
    assert 10 << 20 < before < 200 << 20
    # 64 MB were filled; 512 were asked for and never touched.
    assert before + (60 << 20) < after < before + (80 << 20)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (
            "model name\t: First\nflags\t\t: avx2 avx512f\n\nmodel name : Second\n",
            "First avx512f",
        ),
        ("Features : fp asimd\nHardware : BCM2711\n", "BCM2711 asimd"),
        ("", platform.processor() or platform.machine()),
    ],
)
def test_a_processor_is_named_with_its_widest_vectors(tmp_path, content, name):
    if content:
        (tmp_path / "cpuinfo").write_text(content)
    assert hardware._cpu_name(tmp_path / "cpuinfo") == name


# Energy


@pytest.fixture
def counters(tmp_path):
    """Make counters of energy; return the function that moves them."""

    def move(package, core=0, memory=0, platform=0):
        for zone, name, microjoules in (
            ("intel-rapl:0", "package-0", package),
            ("intel-rapl:0:0", "core", core),
            ("intel-rapl:0:1", "dram", memory),
            ("intel-rapl:1", "package-1", 10 * package % 1_000_000),
            ("intel-rapl:2", "psys", platform),
            # The same processor by another way.
            ("intel-rapl-mmio:0", "package-0", package),
        ):
            folder = tmp_path / zone
            folder.mkdir(exist_ok=True)
            (folder / "name").write_text(name + "\n")
            (folder / "energy_uj").write_text(f"{microjoules}\n")
            (folder / "max_energy_range_uj").write_text("1000000\n")

    return move


def test_energy_is_that_of_processors_and_memory_each_once(counters, tmp_path):
    counters(999_000, memory=500)
    meter = hardware.EnergyMeter(tmp_path)
    counters(4000, core=500_000, memory=600, platform=900_000)
    # A counter began again: 1000 to the end and 4000 more; of the other processor
    # 990 000 to 40 000.
    assert meter.joules() == pytest.approx((5000 + 50_000 + 100) / 1e6)


def test_a_machine_that_does_not_tell_is_passed_over_in_silence(counters, tmp_path):
    assert hardware.EnergyMeter(tmp_path / "nowhere").joules() is None
    counters(1000)
    meter = hardware.EnergyMeter(tmp_path)
    counter = tmp_path / "intel-rapl:1" / "energy_uj"
    counter.unlink()
    counter.mkdir()  # who may not read a counter gets an OSError as well
    assert meter.joules() is None
