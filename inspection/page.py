"""A page as one HTML file that needs no network: style, script and pictures are in it."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from .charts import text
from .pictures import Picture
from .runs import Run
from .sections import compared, shown_picture, single

_HERE = Path(__file__).parent


def page(title: str, body: str) -> str:
    """A page around a body, in which texts of others are escaped.

    The policy lets the browser load nothing, and run no script but the page's own, whatever the body holds.
    """
    css, script = ((_HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{text(title)}</title><style>{css}</style></head>\n<body>{body}\n<script>{script}</script></body></html>\n"
    )


def report_page(runs: Sequence[Run], beside: Path | None = None) -> str:
    """The report of a run, or of several beside each other.

    Args:
        runs: at least one.
        beside: the folder of the page, from which links lead to the files of the runs; None: that of the first run.
    """
    beside = runs[0].folder if beside is None else beside
    if len(runs) == 1:
        return page(f"Report of {runs[0].name}", single(runs[0], beside))
    return page(f"{len(runs)} runs", compared(runs, beside))


def gallery(title: str, pictures: Sequence[Picture]) -> str:
    """A page that shows pictures with what they mean."""
    body = [f"<h1>{text(title)}</h1>"]
    for picture in pictures:
        content = base64.b64encode(picture.png()).decode()
        body.append(shown_picture(content, picture.caption, picture.name))
    return page(title, "\n".join(body))
