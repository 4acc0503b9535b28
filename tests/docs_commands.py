"""The commands and snippets of the README and the guides, and what is done with each of them.

Fenced blocks of `bash` and `python`, and commands in running text, are collected from `PAGES`. `RULES` tells for each
command how it is run and which options shorten it, which test runs it already, or why it cannot run here.
"""

import ast
import re
import shlex
from dataclasses import dataclass
from functools import cache

from helpers import ROOT

PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))]
PAGES += ["detection/README.md", "CONTRIBUTING.md"]
LANGUAGES = {"bash", "python", "text", "bibtex"}
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:[A-Z_]+=[^`\s]+ )*(?:python|bash|pip|torchrun|sbatch|kernelwarehouse) [^`]+)`")


@dataclass(frozen=True)
class Command:
    """A command of a page: its words, and the variables that stand before it."""

    page: str
    text: str
    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Snippet:
    """A block of Python of a page."""

    page: str
    text: str


@dataclass(frozen=True)
class Rule:
    """What is done with the commands that a pattern matches from their beginning.

    Exactly one of `run`, `tested` and `parsed` is given.

    pattern: a regular expression.
    run: options that shorten it.
    tested: "file::test" of the test that runs such a command; its options are parsed here.
    parsed: what is missing here to run it; its options are parsed.
    slow: run it with --slow only.
    fresh: files and folders to remove before.
    package: what it imports that an environment without detection lacks; it is then left out.
    """

    pattern: str
    run: str | None = None
    tested: str = ""
    parsed: str = ""
    slow: bool = False
    fresh: tuple[str, ...] = ()
    package: str = ""


# a run of seconds on the images of the workshop
_NET = "--model kw_test_resnet --input_size 32 --device cpu"
_TINY = f"{_NET} --batch_size 4 --update_freq 1 --epochs 1 --warmup_epochs 0 --num_workers 0 --temp_epoch 0"
_DIGITS = "--batch_size 128 --epochs 1 --temp_epoch 0 --device cpu --report false"
_CPU = "--device cpu"
_SMALL = f"{_CPU} --input_size 64 --batch_size 2"
_SETUP = "test_setup.py::test_second_run_is_quick_and_a_killed_one_is_repaired"
_DETECTION = "test_detection_runs.py::"
_CONFIG = r"python main.py --kw_config configs/resnet18/kw\dx_resnet18.json "

RULES = [
    # set-up
    Rule(r"bash scripts/setup.sh", tested=_SETUP),
    Rule(r"source .venv/bin/activate", tested=_SETUP),
    Rule(r"bash scripts/demo.sh", run="", slow=True),
    Rule(r"bash scripts/test.sh", parsed="it runs this test"),
    Rule(r"pip install", tested="test_package.py::test_metadata"),
    Rule(r".venv/bin/pre-commit install", parsed="it changes the repository"),
    Rule(r"python docs/site/draw.py", tested="test_site.py::test_drawings_are_those_of_the_script"),
    Rule(r"python docs/site/run_notebook.py", tested="test_site.py::test_notebook_runs"),
    Rule(r"python -m mkdocs build", tested="test_site.py::test_site_is_built_without_a_warning"),
    # main.py
    Rule(r"python main.py --help", run=""),
    Rule(r"python main.py --kw_config configs/digits/kw1x_test", run=_DIGITS, fresh=("OUT",)),
    Rule(r"python main.py --kw_config configs/digits/test_resnet", run=_DIGITS, fresh=("STATIC",)),
    Rule(r"python main.py --model kw_efficientnet_b0 --dry_run", run=_SMALL, slow=True),
    Rule(_CONFIG + r".*--print_config", run=""),
    Rule(_CONFIG + r".*--dry_run", run=f"{_TINY} --output_dir NEW"),
    Rule(_CONFIG + r".*--data_set wds", run=_TINY, fresh=("OUT",)),
    Rule(_CONFIG + r".*--eval true", run=f"{_NET} --num_workers 0"),
    Rule(_CONFIG + r".*--init_static", run=f"{_TINY} --report false", fresh=("OUT",)),
    Rule(_CONFIG + r".*--auto_resume false", run=f"{_TINY} --report false"),
    Rule(_CONFIG + r".*--(epochs|save_interval)", run=f"{_TINY} --report false", fresh=("OUT",)),
    Rule(_CONFIG, run=_TINY, fresh=("OUT",)),
    Rule(r"python main.py --eval true --resume OUT/checkpoint-best.pth", run=f"{_CPU} --num_workers 0"),
    # several processes
    Rule(r"(python -m torch.distributed.launch|torchrun) .* --dry_run", parsed="8 GPUs"),
    Rule(r"(python -m torch.distributed.launch|torchrun) ", tested="test_launch.py::test_training_in_processes"),
    Rule(r"NODES=2 .*scripts/launch.sh", parsed="a second machine"),
    Rule(r"PROCESSES=8 bash scripts/launch.sh", tested="test_faults_of_ranks.py::test_one_of_three_processes_killed"),
    Rule(r"sbatch", tested="test_launch_scripts.py::test_a_slurm_job_is_pre_empted_and_goes_on"),
    Rule(r"python scripts/run_with_submitit", tested="test_launch_scripts.py::test_a_job_of_submitit"),
    # data
    Rule(r"python scripts/check_data.py", run="--num_workers 1"),
    Rule(r"python scripts/make_mini_coco.py", run="--train 8 --val 4", fresh=("mini_coco",), package="pycocotools"),
    # trained models
    Rule(r"python scripts/predict.py", run=_CPU),
    Rule(r"python scripts/validate.py", run=f"{_CPU} --num_workers 0"),
    Rule(r"python scripts/(average_checkpoints|clean_checkpoint)", run=""),
    Rule(r"python scripts/export.py .*--int8", run="", slow=True),
    Rule(r"python scripts/export.py .*\.(pt2|onnx)$", run="", slow=True),
    Rule(r"python scripts/export.py", run=""),
    Rule(r"python scripts/visualize.py .*--detector", tested="test_visualize.py::test_pictures_of_a_detector"),
    Rule(r"python scripts/visualize.py", run=f"--count 12 {_CPU}", slow=True),
    Rule(r"python scripts/report.py", run=""),
    # measurements
    Rule(r"python scripts/summarize.py", run=""),
    Rule(r"python scripts/train_digits.py", run="configs/digits/test_resnet.json --seeds 0", slow=True),
    Rule(r"python scripts/scaling.py --speed CONFIG", tested="test_scaling.py::test_measured_speed"),
    Rule(r"python scripts/scaling.py", run=""),
    Rule(r"python scripts/benchmark.py", tested="test_benchmark.py::test_numbers_are_kept"),
    Rule(r"python scripts/profile_step.py", tested="test_benchmark.py::test_profile"),
    Rule(r"python scripts/benchmark_loading.py", tested="test_benchmark.py::test_loading"),
    Rule(r"python scripts/fit_costs.py", tested="test_benchmark.py::test_costs_are_fitted"),
    Rule(r"python scripts/gpu_check.py", tested="test_gpu_check.py::test_dry_run"),
    # detection
    Rule(r"(bash detection/dist_(train|test)|bash detection/slurm_train)", parsed="COCO, and 8 GPUs"),
    Rule(r"python detection/\w+.py .*(detection/configs/kw|CHECKPOINT)", parsed="COCO"),
    Rule(r"python detection/train.py", tested=_DETECTION + "test_training_writes_safe_checkpoints"),
    Rule(r"python detection/test.py", tested=_DETECTION + "test_evaluation_prints_what_training_did"),
    Rule(r"python detection/infer.py", tested=_DETECTION + "test_pictures_are_drawn"),
    # the package
    Rule(r"kernelwarehouse --help", run=""),
    Rule(r"kernelwarehouse train", run=_DIGITS, fresh=("OUT",)),
    Rule(r"kernelwarehouse evaluate", run=_CPU),
    Rule(r"kernelwarehouse convert", run=_SMALL, slow=True),
]


def rule_of(command: Command) -> Rule | None:
    """The first rule whose pattern fits a command."""
    return next((rule for rule in RULES if re.match(rule.pattern, command.text)), None)


def fences(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and text."""
    return _FENCE.findall((ROOT / page).read_text())


@cache
def contents(page: str) -> tuple[Command | Snippet, ...]:
    """The commands and snippets of a page, in their order; those in running text come last."""
    found: list[Command | Snippet] = []
    for language, text in fences(page):
        if language == "bash":
            found += commands(page, text)
        elif language == "python":
            found.append(Snippet(page, text))
    prose = _FENCE.sub("", (ROOT / page).read_text())
    for text in _INLINE.findall(prose):
        # three dots stand for options that the text does not repeat; words in capitals for what the reader has
        if "..." not in text:
            found += commands(page, " ".join(text.split()))
    return tuple(found)


def commands(page: str, block: str) -> list[Command]:
    """The commands of a block of bash: lines joined, comments dropped, variables put in."""
    result, known = [], {}
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        variables = {}
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if not words:
            known |= variables
            continue
        words = [word for text in words for word in _put_in(text, known)]
        before = [f"{name}={value}" for name, value in variables.items()]
        result.append(Command(page, " ".join([*before, *words]), tuple(words), tuple(variables.items())))
    return result


def _put_in(word: str, known: dict[str, str]) -> list[str]:
    """A word with its variables and braces put in, as a shell does outside of quotes."""
    if word.startswith("$"):
        return known[word[1:]].split()
    match = re.fullmatch(r"(.*)\{([\w,]+)\}(.*)", word)
    return [match[1] + part + match[3] for part in match[2].split(",")] if match else [word]


@cache
def names_of_tests(file: str) -> frozenset[str]:
    """The names of the tests of a file."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
