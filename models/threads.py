"""How the CPU's threads wait for each other."""

import os


def wait_briefly() -> None:
    """Let OpenMP's threads spin for about 20 microseconds and then sleep; call it before torch is loaded.

    By default they spin for milliseconds. This starves other threads wherever there are more threads than free cores,
    for example beside loader processes: measured up to 100 times slower on 2 busy cores. Without any spinning, every
    small operation waits for a thread to wake up: MobileNetV2 at batch 1 takes twice as long.

    Environment variables that the user has set are kept.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ["GOMP_SPINCOUNT"] = "10000"
