"""What MkDocs does for this site beside its own work (`hooks` of mkdocs.yml).

- Pages link to files of the project as these lie in the repository, so that the links work there as well. Every file
  that a page links to becomes a part of the site: Markdown as a page, anything else as it is.
- Formulas between lines of `$$` become drawings, so that the pages need no script that is loaded from elsewhere.
"""

import html
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from matplotlib import mathtext, rc_context
from matplotlib.font_manager import FontProperties
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# code, in which nothing is a link or a formula, or the target of a link
_LINK = re.compile(
    r"(?P<code>^```.*?^```$|`[^`\n]+`)|\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)", re.DOTALL | re.M
)
_FORMULA = re.compile(r"(?P<code>^```.*?^```$)|^\$\$\n(?P<text>.*?)\n\$\$$", re.DOTALL | re.MULTILINE)
_log = logging.getLogger("mkdocs.hooks.project")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the project that pages link to, and those that these link to."""
    waiting = [Path(file.abs_src_path) for file in files if file.is_documentation_page()]
    known = {file.src_uri for file in files}
    while waiting:
        page = waiting.pop()
        for path in _linked(page):
            name = _place(path)
            if name in known:
                continue
            if not path.is_file():
                _log.warning("%s links to %s, which is no file of the project", page.relative_to(ROOT), path)
                continue
            known.add(name)
            files.append(File.generated(config, name, abs_src_path=str(path)))
            if path.suffix == ".md":
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to the places of the files in the site, and draw formulas."""
    source = Path(page.file.abs_src_path or ROOT / page.file.src_uri)

    def relative(match: re.Match[str]) -> str:
        path = _file_of(source, match["target"])
        if path is None:
            return match[0]
        ups = "../" * page.file.src_uri.count("/")
        return f"]({ups}{_place(path)}{match['anchor'] or ''})"

    markdown = _LINK.sub(relative, markdown)
    return _FORMULA.sub(lambda match: match["code"] or _drawn(match["text"]), markdown)


def _linked(page: Path) -> Iterator[Path]:
    for match in _LINK.finditer(page.read_text()):
        path = _file_of(page, match["target"])
        if path is not None:
            yield path


def _file_of(page: Path, target: str | None) -> Path | None:
    """The file that a link of a page means; None of code, and of an address elsewhere."""
    if target is None or re.match(r"[a-z]+:", target):
        return None
    return (page.parent / target).resolve()


def _place(path: Path) -> str:
    """Where a file lies in the site: docs/ is its root, and index.md stands for the README."""
    if path == ROOT / "README.md":
        return "index.md"
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def _drawn(formula: str) -> str:
    """A formula in TeX as SVG, in the colour of the text around it."""
    drawn = io.StringIO()
    # glyphs as paths, named by what they are: the same formula is the same text
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "formula", "mathtext.fontset": "cm"}):
        mathtext.math_to_image(f"${' '.join(formula.split())}$", drawn, FontProperties(size=15), format="svg", dpi=96)
    svg = re.sub(r"<metadata>.*?</metadata>|<\?xml.*?\?>|<!DOCTYPE.*?>", "", drawn.getvalue(), flags=re.DOTALL)
    # the background, and colours of its own
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, flags=re.DOTALL).replace("<svg ", '<svg role="img" ', 1)
    svg = re.sub(r"\n\s*", " ", svg).strip()
    return f'<div class="formula" role="math" aria-label="{html.escape(formula)}">{svg}</div>'
