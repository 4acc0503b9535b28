"""The catalogue of faults, and the table of what the tests measured.

python -m pytest --slow --faults results/faults.md tests/test_*faults*.py tests/test_hosts.py ...
"""

from pathlib import Path

CATALOGUE = {
    "F1": ("SIGKILL during a save, at random", "every folder resumes, at most the last save is lost"),
    "F2": ("SIGKILL at every system call of a save", "every folder resumes"),
    "F3": ("order of the system calls of a save", "fsync of the file, rename, fsync of the folder"),
    "F4": ("full disk while saving", "older files intact, the run goes on, one warning for each failed save"),
    "F5": ("EIO from fsync, EROFS from rename", "as F4, and no false claim"),
    "F6": ("full disk of TensorBoard", "training finishes"),
    "F7": ("newest checkpoint truncated", "64 of 64 fall back to the one before"),
    "F8": ("one bit of the newest flipped", "all refused, the one before is taken"),
    "F9": ("all checkpoints bad", "an error, never a start from epoch 0"),
    "F10": ("code in a checkpoint", "never runs"),
    "F11": ("code in texts of checkpoints and configs", "never runs"),
    "F12": ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 with F10", "never runs"),
    "F13": ("NaN in one process", "same decision everywhere, stops after the budget, nothing non-finite is saved"),
    "F14": ("unreadable images", "named and counted; stops above a share; an evaluation names the file"),
    "F15": ("loader process killed, or stopped", "an error at once, or after the time-out; a restart resumes"),
    "F16": ("no shared memory, no file descriptors", "a clear error, no hang"),
    "F17": ("one of three processes killed", "restarts, and ends with the weights of the unbroken run"),
    "F18": ("one process stopped", "ends after the time-out, restarts, and finishes"),
    "F19": ("a machine lost, and back", "finishes"),
    "F20": ("a machine lost for good; the link down", "goes on with fewer processes, same images per update"),
    "F21": ("SIGTERM to torchrun", "all processes save at the same update; nothing is repeated"),
    "F22": ("SIGKILL to torchrun; a second start", "its processes end; the second start is refused"),
    "F23": ("killed at any moment", "weights, optimizer, average, random state and logs equal the unbroken run's"),
    "F24": ("other numbers of processes and workers", "each image once"),
    "F25": ("evaluation by 1 to 8 processes", "the counts are equal"),
    "F26": ("mistakes in configs", "all refused, by key"),
    "F27": ("detection: killed during a save", "every folder resumes"),
    "F28": ("names, times and clocks", "what a checkpoint holds counts"),
    "F29": ("python -O", "the same"),
    "F30": ("state of a model, saved and read in a new process", "outputs equal"),
    "cost": ("a save of 100 MB", "at most 1.5 times a bare torch.save, less than 1 % of the time between two saves"),
}
ROWS: dict[str, list[str]] = {}


def measured(fault, result):
    """Note what a test of this fault measured."""
    ROWS.setdefault(fault, []).append(result)


def merge(rows):
    """Take over what another process of the session measured."""
    for fault, results in rows.items():
        ROWS.setdefault(fault, []).extend(results)


def write_table(path):
    """Write the table; faults that did not run in this session keep the rows of the file."""
    target = Path(path)
    old = {}
    if target.is_file():
        head, _, table = target.read_text().partition("| fault |")
        rows, _, tail = table.partition("\n\n")
        cells = [line.split(" | ") for line in rows.splitlines() if line.startswith("| ")]
        old = {row[0].removeprefix("| "): row[-1].removesuffix(" |") for row in cells}
        tail = tail and "\n" + tail
    else:
        head, tail = "# Faults\n\n", ""
    lines = ["| fault | what happens | must hold | measured |", "|---|---|---|---|"]
    for name, (title, condition) in CATALOGUE.items():
        found = "; ".join(dict.fromkeys(ROWS.get(name, []))) or old.get(name, "")
        lines.append(f"| {name} | {title} | {condition} | {found} |")
    target.write_text(head + "\n".join(lines) + "\n" + tail)
