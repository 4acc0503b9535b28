"""The part of CHANGELOG.md about one version, for its release: python scripts/release_notes.py v0.1.0

Refuses a tag that is not the project's version, and a version that CHANGELOG.md and CITATION.cff do not both tell of.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import models


def notes(tag: str, root: Path = ROOT) -> str:
    """The text under the version's heading, without the heading.

    Args:
        tag: "v" and a version.
        root: the folder of CHANGELOG.md and CITATION.cff.

    Raises:
        ValueError: the tag is not of this version, or one of the files does not tell of it.
    """
    version = models.__version__
    if tag != f"v{version}":
        raise ValueError(f"the tag {tag} is not the version {version} of models/__init__.py: change one of them")
    if f"\nversion: {version}\n" not in (root / "CITATION.cff").read_text():
        raise ValueError(f"CITATION.cff is of another version than {version}: change its version and date-released")
    heading = rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)\n"
    found = re.search(heading + r"(.+?)(?=^## |\Z)", (root / "CHANGELOG.md").read_text(), re.MULTILINE | re.DOTALL)
    if not found:
        raise ValueError(f"CHANGELOG.md has no part about {version}: begin one with '## {version} (YEAR-MONTH-DAY)'")
    return found[1].strip() + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag", help="the tag of the release, such as v0.1.0")
    args = parser.parse_args(argv)
    try:
        print(notes(args.tag), end="")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
