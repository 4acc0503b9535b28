"""The compiled backends build for processors that no test runs on."""

import shutil
import subprocess

import pytest

from models.ops.backends import compiled

COMPILER = shutil.which("aarch64-linux-gnu-g++")
SOURCES = sorted(path.name for path in compiled.FOLDER.glob("*.cpp"))
# the least that every 64-bit ARM has (NEON), and scalable vectors
ARM = {"neon": [], "sve": ["-march=armv8.2-a+sve"]}


@pytest.mark.slow
@pytest.mark.parametrize("real", compiled.NAMES.values())
@pytest.mark.parametrize("flags", ARM.values(), ids=ARM)
@pytest.mark.parametrize("source", SOURCES)
def test_builds_for_arm(source, flags, real, tmp_path):
    if COMPILER is None:
        pytest.skip("there is no aarch64-linux-gnu-g++ (Debian: apt-get install g++-aarch64-linux-gnu)")
    library = tmp_path / "library.so"
    command = [COMPILER, *compiled.FLAGS, f"-DREAL={real}", *flags, "-Wall", "-Werror", "-Wno-unused-function"]
    subprocess.run([*command, str(compiled.FOLDER / source), "-o", str(library)], check=True, timeout=300)
    # ELF for machine 183, AArch64
    assert library.read_bytes()[18:20] == (183).to_bytes(2, "little")


def test_every_source_is_known():
    assert {"attention.cpp", "depthwise.cpp", "fused.cpp", "pointwise.cpp", "streamed.cpp"} <= set(SOURCES)
