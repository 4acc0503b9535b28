#!/usr/bin/env python
"""Write the report of a run anew, or of several runs beside each other, as one HTML file.

    python scripts/report.py OUT                                     # OUT/report.html
    python scripts/report.py STATIC KW OD --output comparison.html

A run is the --output_dir of main.py. The file needs no network and nothing beside it, but for links to the runs' files.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from startup import before_torch

before_torch()

from command_line import Parser
from inspection.page import report_page
from inspection.runs import open_run
from main import fail
from models.config import ConfigError
from models.messages import printable
from utils import check_target, write_out


def parse_arguments(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="DIR", help="the --output_dir of a run")
    parser.add_argument("--output", help="file to write; default: report.html, of one run in its folder")
    args = parser.parse_args(argv)
    if args.output is None:
        args.output = Path(args.folders[0], "report.html") if len(args.folders) == 1 else "report.html"
    return args


def run(args):
    runs = [open_run(Path(folder)) for folder in args.folders]
    output = check_target(args.output)
    if output.suffix != ".html":
        raise ConfigError(f"--output {args.output}: is an HTML file; give a name that ends in .html")
    write_out(report_page(runs, output.parent), output)
    print(f"{printable(output)}: {len(runs)} run{'s' if len(runs) > 1 else ''}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Report with the options of `argv` (None: the command line); returns the exit code."""
    try:
        return run(parse_arguments(argv))
    except ConfigError as error:
        return fail(error)


if __name__ == "__main__":
    sys.exit(main())
