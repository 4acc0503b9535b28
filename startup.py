"""Settings of the process that take effect only if they are made before torch is loaded."""

import os


def before_torch() -> None:
    """Let OpenMP's threads wait briefly, and keep torch's profiler quiet.

    By default OpenMP's threads spin for milliseconds while they wait. This starves other threads wherever there are
    more threads than free cores, for example beside loader processes: measured up to 100 times slower on 2 busy cores.
    Without any spinning, every small operation waits for a thread to wake up: MobileNetV2 at batch 1 takes twice as
    long. Here they spin for about 20 microseconds and then sleep.

    Environment variables that the user has set are kept.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ["GOMP_SPINCOUNT"] = "10000"
    # otherwise the profiler prints a line at every start and stop
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
