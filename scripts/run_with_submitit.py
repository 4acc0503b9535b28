"""Submit a training to SLURM with submitit; the job continues after its time limit and after pre-emption.

    python scripts/run_with_submitit.py --nodes 2 --gpus 8 --hours 24 --output_dir OUT --kw_config CONFIG ...

What follows the options below goes to main.py. `--output_dir` is also where submitit writes its logs. It needs
`pip install submitit`; without it, scripts/launch_slurm.sh does the same with sbatch.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line import at_least
from main import fail
from models.config import ConfigError

# exit code of main.py after SIGTERM or SIGUSR1, when it has saved
STOPPED = 143
# seconds for saving; SLURM is asked for a signal so long, and a little more, before it ends the job
PATIENCE = 100


class Training:
    """A run of main.py, which submitit pickles, and calls in every task of the job."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self._process: subprocess.Popen | None = None

    def __call__(self) -> None:
        """Run main.py in this task; SLURM's variables tell it its rank.

        Raises:
            RuntimeError: it failed; submitit notes it as the job's error.
        """
        self._process = subprocess.Popen([sys.executable, str(ROOT / "main.py"), *self.words], cwd=ROOT)
        code = self._process.wait()
        if code not in (0, STOPPED):
            raise RuntimeError(f"main.py ended with {code}; its output tells why")

    def checkpoint(self, *arguments: Any) -> Any:
        """Let the run save, and return what submitit puts into the queue: the same command, which continues.

        submitit calls it in the first task. Its run makes those of the other tasks save and stop, too.
        """
        import submitit

        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=PATIENCE)
        return submitit.helpers.DelayedSubmission(Training(self.words))


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--nodes", type=at_least(1), default=1, help="machines")
    parser.add_argument("--gpus", type=at_least(1), default=8, help="GPUs, and processes, of each machine")
    parser.add_argument("--hours", type=at_least(1), default=24, help="time limit of a job")
    parser.add_argument("--partition", help="SLURM partition")
    parser.add_argument("--cpus", type=at_least(1), default=8, help="CPU cores of each process")
    parser.add_argument("--output_dir", required=True, help="folder of checkpoints and logs, shared by all machines")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm", help="local: try it on this machine")
    return parser.parse_known_args(argv)


def submit(args: argparse.Namespace, words: list[str]) -> str:
    """Submit the job; returns its number.

    Raises:
        ConfigError: submitit is not installed, or cannot submit.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError(
            "submitit is not installed: pip install submitit, or use scripts/launch_slurm.sh with sbatch"
        ) from None
    folder = Path(args.output_dir) / "slurm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        executor = submitit.AutoExecutor(folder=folder, cluster=args.cluster)
        executor.update_parameters(
            name="kernelwarehouse", nodes=args.nodes, tasks_per_node=args.gpus, cpus_per_task=args.cpus,
            timeout_min=60 * args.hours, slurm_partition=args.partition, slurm_signal_delay_s=PATIENCE + 20,
            **({"gpus_per_node": args.gpus} if args.cluster == "slurm" else {}),
        )  # fmt: skip
        return executor.submit(Training([*words, "--output_dir", os.path.abspath(args.output_dir)])).job_id
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"the job cannot be submitted: {str(error).splitlines()[0]}") from None


def main(argv: list[str] | None = None) -> int:
    args, words = parse(argv)
    try:
        print(f"job {submit(args, words)}; its logs are in {Path(args.output_dir) / 'slurm'}")
    except ConfigError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
