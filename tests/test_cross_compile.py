"""The compiled backends build for processors that no test runs on."""

import shutil
import subprocess

import pytest
import torch
from helpers import ROOT
from tolerance import assert_same

from models.ops.backends import compiled

COMPILER = shutil.which("aarch64-linux-gnu-g++")
SOURCES = sorted(path.name for path in compiled.FOLDER.glob("*.cpp"))
# the least that every 64-bit ARM has (NEON), and scalable vectors
ARM = {"neon": [], "sve": ["-march=armv8.2-a+sve"]}


@pytest.mark.slow
@pytest.mark.parametrize("real", compiled.REALS.values(), ids=" ".join)
@pytest.mark.parametrize("flags", ARM.values(), ids=ARM)
@pytest.mark.parametrize("source", SOURCES)
def test_builds_for_arm(source, flags, real, tmp_path):
    if COMPILER is None:
        pytest.skip("there is no aarch64-linux-gnu-g++ (Debian: apt-get install g++-aarch64-linux-gnu)")
    library = tmp_path / "library.so"
    command = [COMPILER, *compiled.FLAGS, *real, *flags, "-Wall", "-Werror", "-Wno-unused-function"]
    subprocess.run([*command, str(compiled.FOLDER / source), "-o", str(library)], check=True, timeout=300)
    # ELF for machine 183, AArch64
    assert library.read_bytes()[18:20] == (183).to_bytes(2, "little")


@pytest.mark.slow
def test_computes_the_same_on_arm(tmp_path):
    """The program prints the same numbers on this processor and on an emulated ARM."""
    emulator = shutil.which("qemu-aarch64")
    if COMPILER is None or emulator is None:
        pytest.skip("there is no aarch64-linux-gnu-g++ or no qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    results = []
    for compiler, start in ((compiled.compiler(), []), (COMPILER, [emulator])):
        program = tmp_path / "program"
        flags = ["-O3", "-std=c++17", "-fopenmp", "-static", "-DREAL=double", "-DPOISON", f"-I{compiled.FOLDER}"]
        source = str(ROOT / "tests/arm_driver.cpp")
        subprocess.run([compiler, *flags, source, "-o", str(program)], check=True, timeout=300)
        lines = subprocess.run([*start, program], check=True, capture_output=True, text=True, timeout=60).stdout
        results.append(torch.tensor([float(line) for line in lines.split()], dtype=torch.float64))
    assert len(results[0]) == 2 * 2 * 19 * 23
    assert_same(results[1], results[0])


def test_every_source_is_known():
    names = ("attention", "depthwise", "fused", "pointwise", "streamed", "winograd")
    assert {f"{name}.cpp" for name in names} <= set(SOURCES)
