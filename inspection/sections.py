"""The sections of a report: what was run, curves, results of single images, pictures of attentions, files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .charts import COLOURS, LARGEST_MATRIX, Curve, curves_chart, matrix, number, swatch, text
from .runs import Run

# classes in a table of accuracies, and rows in one of confusions
CLASSES, CONFUSIONS = 40, 20
FILES = ("log.txt", "steps.jsonl", "times.jsonl", "report.json", "curves.png", "manifest.json")
# title, unit, x axis, source of rows, and the metrics, each with its name
CHARTS = (
    ("loss", "cross-entropy", "epoch", "epochs", {"train_loss": "training", "test_loss": "evaluation"}),
    (
        "top-1 accuracy",
        "%",
        "epoch",
        "epochs",
        {"train_acc1": "training", "test_acc1": "evaluation", "test_acc1_ema": "evaluation, averaged weights"},
    ),
    ("top-5 accuracy", "%", "epoch", "epochs", {"test_acc5": "evaluation"}),
    ("loss of single updates", "cross-entropy", "update", "steps", {"loss": "training"}),
    ("learning rate", "", "update", "steps", {"lr": "learning rate"}),
    ("weight decay", "", "epoch", "epochs", {"train_weight_decay": "weight decay"}),
    ("temperature of the attentions", "", "update", "steps", {"temperature": "temperature"}),
    ("gradient norm", "before clipping", "update", "steps", {"grad_norm": "gradient norm"}),
    ("speed", "images/s", "update", "times", {"images_per_second": "training"}),
    ("memory", "MiB, greatest so far", "update", "times", {"memory_mib": "memory"}),
)
# what differs between runs but says nothing, or is told already: facts and options
SAME = ("parameters", "output_dir", "log_dir", "given", "kw_config")
DASHED = ("train_loss", "train_acc1")


def charts(runs: Sequence[Run]) -> str:
    """All curves; those of one run have different colours, those of several runs the colour of their run."""
    found = []
    for title, unit, xlabel, rows, metrics in CHARTS:
        curves = []
        for index, run in enumerate(runs):
            for order, (key, name) in enumerate(metrics.items()):
                points = run.series(key, rows)
                if key == "temperature" and not any(value for _, value in points):
                    # of a model that has none
                    points = []
                many = len(runs) > 1
                label = f"{labels(runs)[index]}{f': {name}' if len(metrics) > 1 else ''}" if many else name
                curves.append(Curve(label, points, index if many else order, dashed=key in DASHED))
        found.append(curves_chart(title, unit, curves, xlabel))
    body = "".join(found)
    if not body:
        return ""
    return f'<h2>Curves</h2><p class="soft">Point at a chart to read its values.</p><div class="charts">{body}</div>'


def labels(runs: Sequence[Run]) -> list[str]:
    """Names of runs; those of one name are numbered."""
    names = [run.name for run in runs]
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def measures(run: Run) -> dict[str, str]:
    """The numbers of a run that come first: title -> text."""
    found = {}
    best, last = run.best(), run.last()
    if best is not None:
        found["best top-1"] = f"{best[1]:.2f} % (epoch {best[0]:.0f})"
        found["last top-1"] = f"{last:.2f} %"
    if run.last("test_acc5") is not None:
        found["last top-5"] = f"{run.last('test_acc5'):.2f} %"
    averaged = run.best("test_acc1_ema")
    if averaged is not None:
        found["best top-1, averaged weights"] = f"{averaged[1]:.2f} % (epoch {averaged[0]:.0f})"
    if run.record.get("facts", {}).get("parameters"):
        found["parameters"] = run.record["facts"]["parameters"]
    elif run.last("n_parameters") is not None:
        found["parameters"] = f"{run.last('n_parameters'):,.0f}"
    if run.epochs:
        found["epochs"] = f"{len(run.series('epoch'))} of {run.record.get('facts', {}).get('epochs', '?')}"
    if run.speed() is not None:
        found["images per second"] = f"{run.speed():,.0f}"
    if run.seconds() is not None:
        found["training time"] = duration(run.seconds())
    if run.memory() is not None:
        found["memory"] = f"{run.memory():,.0f} MiB"
    return found


def _tiles(found: dict[str, str]) -> str:
    return '<ul class="tiles">' + "".join(f"<li><b>{text(v)}</b>{text(k)}</li>" for k, v in found.items()) + "</ul>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def single(run: Run, beside: Path) -> str:
    """The body of the report of one run."""
    state = run.record.get("state", "")
    parts = [f"<h1>{text(run.record.get('facts', {}).get('model') or run.name)}</h1>"]
    parts.append(f'<p class="soft">{text(run.name)}{f": {text(state)}" if state else ""}</p>')
    parts += [f"<p>Note: {text(note)}.</p>" for note in run.record.get("notes", [])]
    parts += [_tiles(measures(run)), what_was_run(run), charts([run]), images_section(run), attention_section(run)]
    return "\n".join([*parts, files_section(run, beside)])


def what_was_run(run: Run) -> str:
    """The command, its data and versions, and all options to unfold."""
    known = run.record.get("facts", {})
    if not known:
        return ""
    rows = [(text(k), f"<code>{text(v)}</code>" if k == "command" else text(v)) for k, v in known.items()]
    options = [(text(k), f"<code>{text(v)}</code>") for k, v in run.record["options"].items()]
    return (
        f"<h2>What was run</h2>{_table(('', ''), rows)}"
        f"<details><summary>All {len(options)} options</summary>{_table(('option', 'value'), options)}</details>"
    )


def images_section(run: Run) -> str:
    """Confusions, accuracy by class, and mistakes; empty where the run left none."""
    results = run.record.get("results")
    if not results or not results["count"]:
        return ""
    count, total = results["count"], results["total"]
    which = f"all {count:,} images" if count == total else f"a random selection of {count:,} of the {total:,} images"
    accuracy = 100 * results["correct"] / count
    about = (
        f"<p>Top-1 {accuracy:.2f} % on {which} to evaluate, with the weights after the last update. "
        "The same selection is taken every time.</p>"
    )
    confusions = (
        f'<figure class="card"><figcaption>Confusion: true classes in rows, predicted ones in columns</figcaption>'
        f"{_confusion(results)}</figure>"
    )
    by_class = (
        '<figure class="card"><figcaption>Accuracy by class</figcaption>'
        + accuracy_table([results], [""])
        + "</figure>"
    )
    parts = ["<h2>Single images</h2>", about, f'<div class="two">{confusions}{by_class}</div>']
    for key, title in (("worst", "Worst mistakes: highest loss"), ("confident", "Most confident mistakes")):
        if results[key]:
            figures = "".join(_mistake(entry, results["classes"]) for entry in results[key])
            parts.append(f'<h3>{title}</h3><div class="thumbs">{figures}</div>')
    return "\n".join(parts)


def _confusion(results: dict[str, Any]) -> str:
    classes = results["classes"]
    if len(classes) <= LARGEST_MATRIX:
        return matrix(results["confusion"], classes)
    wrong = sorted(((n, t, p) for (t, p), n in results["confusion"].items() if t != p), reverse=True)[:CONFUSIONS]
    rows = [(text(classes[t]), text(classes[p]), str(n)) for n, t, p in wrong]
    note = f'<p class="soft">The {len(rows)} most frequent of {len(classes)} classes.</p>'
    return note + _table(("true class", "predicted as", "images"), rows)


def by_class(results: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Name of a class -> (correct images, images); classes without images are left out."""
    found: dict[str, tuple[int, int]] = {}
    for (true, predicted), count in results["confusion"].items():
        name = results["classes"][true]
        correct, images = found.get(name, (0, 0))
        found[name] = correct + (count if true == predicted else 0), images + count
    return found


def accuracy_table(all_results: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Accuracies by class as bars, those of several runs under each other; of many classes, the lowest."""
    found = [by_class(results) for results in all_results]
    classes = [name for name in all_results[0]["classes"] if any(name in part for part in found)]
    note = ""
    if len(classes) > CLASSES:
        classes.sort(key=lambda name: found[0][name][0] / found[0][name][1] if name in found[0] else 2)
        note = f'<p class="soft">The {CLASSES} lowest of {len(classes)} classes.</p>'
    rows = []
    for name in classes[:CLASSES]:
        bars, counts = [], []
        for index, part in enumerate(found):
            correct, images = part.get(name, (0, 0))
            share = 100 * correct / images if images else 0
            kind = f"bar b{index % COLOURS}"
            title = f' title="{text(names[index])}"' if names[index] else ""
            bars.append(f'<span class="{kind}" style="width:{share * 0.07:.2f}em"{title}></span>{share:.1f} %')
            counts.append(f"{correct} of {images}")
        rows.append((text(name), "<br>".join(bars), "<br>".join(counts)))
    body = _table(("class", "accuracy", "images"), rows).replace("<td><span", '<td class="bars"><span')
    return note + body


def _mistake(entry: dict[str, Any], classes: Sequence[str]) -> str:
    about = text(entry["name"])
    return (
        f'<figure title="{about}"><img alt="{about}" src="data:image/png;base64,{entry["png"]}"><figcaption>'
        f"<b>{text(classes[entry['true']])}</b> taken for <b>{text(classes[entry['predicted']])}</b><br>"
        f"{100 * entry['probability']:.0f} % (true: {100 * entry['of_true']:.0f} %)<br>"
        f"loss {number(entry['loss'])}</figcaption></figure>"
    )


def shown_picture(content: str, caption: str, name: str) -> str:
    """A PNG in base64 with its caption."""
    return (
        f'<figure class="picture"><img alt="{text(name)}" src="data:image/png;base64,{content}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def attention_section(run: Run) -> str:
    """The pictures of attentions; empty for a static model."""
    pictures = run.record.get("pictures", [])
    if not pictures:
        return ""
    figures = [shown_picture(entry["png"], entry["caption"], entry["name"]) for entry in pictures]
    more = "<p>More pictures, each warehouse by itself, Grad-CAM++ and t-SNE: <code>scripts/visualize.py</code>.</p>"
    return "<h2>Attentions</h2>" + "".join(figures) + more


def files_section(run: Run, beside: Path) -> str:
    """Links to the files of a run, from the folder of the page."""
    names = [name for name in FILES if (run.folder / name).is_file()]
    names += sorted(path.name for path in run.folder.glob("checkpoint-*.pth"))
    links = []
    for name in names:
        path = os.path.relpath((run.folder / name).resolve(), beside.resolve())
        # all but these is escaped, so that no name is taken for an address of another kind
        links.append(f'<li><a href="{text(quote(os.fsencode(path), safe="/."))}">{text(name)}</a></li>')
    return f"<h2>Files</h2><ul>{''.join(links)}</ul>" if links else ""


def compared(runs: Sequence[Run], beside: Path) -> str:
    """The body of the report of several runs."""
    names = labels(runs)
    parts = [f"<h1>{len(runs)} runs beside each other</h1>"]
    swatches = "".join(f"<li>{swatch(f'c{i % COLOURS}')}{text(name)}</li>" for i, name in enumerate(names))
    parts.append(f'<ul class="legend">{swatches}</ul>')
    header = ["", *map(text, names)]
    found = [measures(run) for run in runs]
    keys = dict.fromkeys(key for entry in found for key in entry)
    parts.append("<h2>Results</h2>" + _table(header, [[text(k), *(text(e.get(k, "")) for e in found)] for k in keys]))
    parts.append(charts(runs))
    parts.append("<h2>What differs</h2>" + _differences(runs, names))
    with_results = [(run, name) for run, name in zip(runs, names) if (run.record.get("results") or {}).get("count")]
    if with_results:
        results = [run.record["results"] for run, _ in with_results]
        parts.append("<h2>Accuracy by class</h2>" + _legend(runs, names, with_results))
        parts.append(accuracy_table(results, [name for _, name in with_results]))
    for run, name in zip(runs, names):
        inside = what_was_run(run) + images_section(run) + attention_section(run) + files_section(run, beside)
        parts.append(f"<h2>{text(name)}</h2><details><summary>Details of this run</summary>{inside}</details>")
    return "\n".join(parts)


def _legend(runs: Sequence[Run], names: Sequence[str], with_results: Sequence[tuple[Run, str]]) -> str:
    """Which bar of a class is which run; where a run has no results, the colours count those that have."""
    bars = "".join(
        f'<li><span class="bar b{i % COLOURS}" style="width:1.5em"></span>{text(name)}</li>'
        for i, (_, name) in enumerate(with_results)
    )
    return f'<ul class="legend">{bars}</ul>'


def _differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The facts and options in which those runs differ that recorded them."""
    known = [(run.record, name) for run, name in zip(runs, names) if run.record]
    if len(known) < len(runs):
        missing = ", ".join(text(name) for run, name in zip(runs, names) if not run.record)
        note = f'<p class="soft">Without a record: {missing}.</p>'
    else:
        note = ""
    rows, seen = [], set(SAME)
    for source in ("facts", "options"):
        entries = [record[source] for record, _ in known]
        for key in dict.fromkeys(key for entry in entries for key in entry):
            values = [entry.get(key, "") for entry in entries]
            if len(set(values)) > 1 and key not in seen:
                rows.append([text(key), *(f"<code>{text(value)}</code>" for value in values)])
            seen.add(key)
    if not rows:
        return f"{note}<p>Nothing that the runs recorded.</p>"
    return note + _table(["", *(text(name) for _, name in known)], rows)
