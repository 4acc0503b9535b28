"""The guides are built as a site without a warning and without a network; their links, pictures and tables hold."""

import csv
import functools
import html.parser
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import docs_commands
import pytest
from helpers import ROOT

from models.ops.cost import work
from models.ops.geometry import geometry

DOCS = sorted(ROOT.glob("docs/**/*.md"))
NOTEBOOK = ROOT / "docs/notebooks/look_inside.ipynb"
# what a page may load; links to other sites are no loading
_LOADS = {"script": "src", "img": "src", "link": "href", "source": "src", "iframe": "src", "object": "data"}


class _Page(html.parser.HTMLParser):
    """The links of a page, what it loads, and its anchors."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given.get("id"), given.get("name")}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        target = given.get(_LOADS.get(tag))
        if target and given.get("rel") not in ("canonical", "next", "prev", "alternate"):
            self.loads.append(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site, and what was printed."""
    folder = tmp_path_factory.mktemp("site")
    # a proxy that nobody answers stands for no network
    off = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https")}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        env={"PATH": str(Path(sys.executable).parent), "HOME": str(folder), "NO_MKDOCS_2_WARNING": "1", **off},
    )  # fmt: skip
    return folder, done


@pytest.fixture(scope="module")
def pages(site):
    folder, done = site
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: _Page(path) for path in sorted(folder.rglob("*.html")) if path.name != "404.html"}


def test_site_is_built_without_a_warning(site):
    folder, done = site
    assert done.returncode == 0 and "WARNING" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert (folder / "index.html").is_file()


def test_every_page_is_in_the_site(pages, site):
    for path in DOCS:
        place = path.relative_to(ROOT / "docs").with_suffix(".html")
        assert site[0] / place in pages, place


def test_links_and_anchors_resolve(pages):
    broken = []
    for path, page in pages.items():
        for link in page.links + page.loads:
            target, anchor = urldefrag(link)
            if re.match(r"[a-z]+:", link):
                continue
            there = (path.parent / unquote(target)).resolve() if target else path
            if not there.exists() or (
                anchor and there.suffix == ".html" and unquote(anchor) not in _Page(there).anchors
            ):
                broken.append(f"{path.name}: {link}")
    assert not broken


def test_nothing_is_loaded_from_elsewhere(pages, site):
    """No script, font, style or picture; addresses in the theme's own scripts are of features that no page uses."""
    loaded = [f"{path.name}: {target}" for path, page in pages.items() for target in page.loads if ":" in target[:8]]
    assert [text for text in loaded if not text.partition(": ")[2].startswith("data:")] == []
    for path in site[0].rglob("*.css"):
        remote = re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"']*", path.read_text())
        assert not remote, path
    for path in pages:
        assert "mermaid" not in path.read_text() and "fonts.googleapis" not in path.read_text()


def test_links_of_the_sources_are_files():
    """On the pages as they lie in the repository, too."""
    for page in docs_commands.PAGES:
        text = re.sub(r"^```.*?^```$|`[^`\n]+`", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _ = urldefrag(target)
            if path and not re.match(r"[a-z]+:", path):
                assert ((ROOT / page).parent / path).exists(), f"{page}: {target}"


def test_named_files_exist():
    """Files of the project that pages name in their text."""
    pattern = r"`((?:configs|scripts|detection|models|results|docs|tests)/[\w/.]+\.\w+)`"
    made_by_commands = {"models/ops/cuda_costs.json", "results/gpu.md", "docs/images/operator.svg"}
    for page in docs_commands.PAGES:
        for name in re.findall(pattern, (ROOT / page).read_text()):
            assert (ROOT / name).exists() or name in made_by_commands, f"{page}: {name}"


def test_drawings_are_those_of_the_script(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs/site")
    import draw

    assert draw.main(tmp_path) == 0
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == ["operator.svg", "orders.svg"]
    for name in drawn:
        assert (tmp_path / name).read_text() == (ROOT / "docs/images" / name).read_text(), (
            f"run docs/site/draw.py: {name}"
        )
    # each row of the drawn attentions is one of KernelWarehouse
    for row in draw.attentions():
        assert sum(map(abs, row)) == pytest.approx(1)
    assert all(path.stat().st_size < 200_000 for path in (ROOT / "docs/images").iterdir())


def _rows(page, begin=0, end=None):
    """The cells of the tables of a page, without heads."""
    lines = (ROOT / page).read_text()[begin:end].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= set("-:")]


@functools.cache
def _table(path):
    with open(ROOT / path, newline="") as file:
        return list(csv.DictReader(file))


def _linked(cell):
    found = re.fullmatch(r"\[[^]]*\]\(\.\./(configs/\S+\.json)\)", cell)
    return found and found[1]


def test_numbers_of_choosing_are_those_of_the_configs():
    counted = {row["config"]: row for row in _table("results/models.csv")}
    paper = {row["config"]: row for row in reversed(_table("configs/tables.csv")) if row["config"]}
    rows = [row for row in _rows("docs/choosing.md") if len(row) > 1 and _linked(row[1])]
    assert len(rows) > 40
    for _, link, parameters, multiply_adds, top1 in rows:
        config = _linked(link)
        assert parameters == f"{int(counted[config]['parameters']) / 1e6:.2f}", config
        assert multiply_adds == f"{int(counted[config]['multiply_adds']) / 1e9:.2f}", config
        assert top1 == paper[config]["top1"], config


def test_costs_of_choosing_are_those_measured():
    """Those of results/; a new measurement changes the page."""
    text = (ROOT / "docs/choosing.md").read_text()
    found = {}
    for row in _table("results/cpu.csv"):
        if (row["batch"], row["size"], row["dtype"]) == ("8", "224", "float32"):
            found.setdefault((row["config"], row["contender"], row["mode"]), []).append(row)

    def middle(config, contender, mode, key):
        runs = found[config, contender, mode]
        assert [row["run"] for row in runs] == ["1", "2", "3"]
        return statistics.median(float(row[key]) for row in runs)

    for shown, config in (
        ("ResNet18", "kw1x_resnet18"),
        ("ResNet50", "kw1x_resnet50"),
        ("MobileNetV2 1.0x", "kw1x_mobilenetv2_100"),
        ("ConvNeXt-Tiny", "kw1x_convnext_tiny"),
    ):
        speeds = [f"{middle(config, 'ours', mode, 'of_static'):.2f}" for mode in ("inference", "training")]
        ours, static = (middle(config, kind, "training", "peak_mb") for kind in ("ours", "static"))
        assert f"| {shown} | {speeds[0]} | {speeds[1]} | {ours / static:.2f} |" in text, shown
    # five budgets in turn, after the batches and the sizes
    ours = [row for row in _table("results/growth.csv") if row["contender"] == "ours"][-10:]
    for i, budget in enumerate(("1/4x", "1/2x", "1x", "2x", "4x")):
        inference, training = (f"{float(row['of_static']):.2f}" for row in ours[2 * i : 2 * i + 2])
        assert f"| {budget} | {inference} | {training} |" in text, budget


def test_rows_to_reproduce_are_those_of_table_2():
    """All of them, with the paper's accuracies and the estimated hours."""
    paper = {row["config"]: row for row in _table("configs/tables.csv") if row["source"] == "KW T2"}
    rows = [row for row in _rows("docs/reproduce.md") if len(row) == 4 and _linked(row[1])]
    assert {_linked(row[1]) for row in rows} == set(paper)
    hours = {row[0]: row[4] for row in _rows("docs/scaling.md") if len(row) > 5 and row[1] in ("roofline", "papers")}
    for name, link, estimate, top1 in rows:
        assert (estimate, top1) == (hours[name], paper[_linked(link)]["top1"]), name


def test_orders_cost_what_the_page_says():
    """Multiply-adds of two orders, by the same counts that choose backends."""
    text = (ROOT / "docs/how-it-works.md").read_text()
    begin, end = text.index("<!-- orders -->"), text.index("<!-- end of orders -->")
    rows = _rows("docs/how-it-works.md", begin, end)[1:]
    assert len(rows) == 3
    for row in rows:
        positions, m, n = map(int, row[1:4])
        c_out, c_in = map(int, row[4].split("x"))
        side = round(positions**0.5)
        shapes = (1, c_in, side, side), (1, m, n), (n, c_out, c_in, 1, 1)
        geo = geometry(*shapes, (3, 3), (1, 1), (1, 1), (1, 1), 1, False)
        assert geo.positions == positions
        mix, _, _, convolve, *_ = work("batched", geo, 4)
        inputs_first = work("mixed", geo, 4)[0]
        for shown, counted in zip(row[5:], (mix + convolve, inputs_first), strict=True):
            assert float(shown) == pytest.approx(counted * 1e3, rel=0.01), row


def test_notebook_holds_its_results():
    content = json.loads(NOTEBOOK.read_text())
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    shown = [output for cell in code for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in shown)
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 2
    assert NOTEBOOK.stat().st_size < 500_000
    # nothing of the machine that it ran on
    assert not re.search(r"/(tmp|home|root|work)/", NOTEBOOK.read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_notebook_runs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs/site")
    import run_notebook

    fresh = run_notebook.executed()
    kept = json.loads(NOTEBOOK.read_text())
    assert [cell.source for cell in fresh.cells] == ["".join(cell["source"]) for cell in kept["cells"]]
    assert [len(cell.get("outputs", [])) > 0 for cell in fresh.cells] == [
        len(cell.get("outputs", [])) > 0 for cell in kept["cells"]
    ]
    accuracy = re.findall(r"([\d.]+) % right", NOTEBOOK.read_text())
    assert float(accuracy[-1]) > 80
