"""Opens pages in headless Chromium."""

import html
import json
import re
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def browser():
    """The path of a browser; without one, the test is skipped."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        pytest.skip(f"no browser is installed ({', '.join(NAMES)}): on Debian, apt-get install chromium")
    return found


# Loads the page in frames of the widths, moves a pointer over its first chart, and writes down what it finds.
_HARNESS = """<!DOCTYPE html><body><script>
const widths = WIDTHS, found = [];
const load = (width) => new Promise((resolve) => {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0`;
  frame.onload = () => resolve(frame);
  frame.src = ADDRESS;
  document.body.append(frame);
});
(async () => {
  for (const width of widths) {
    const frame = await load(width), page = frame.contentDocument, errors = [];
    frame.contentWindow.addEventListener("error", (event) => errors.push(String(event.message)));
    for (const details of page.querySelectorAll("details")) details.open = true;
    const wide = [...page.querySelectorAll("body *")].filter((e) => {
      const box = e.getBoundingClientRect();
      return box.right > width + 1 && !e.closest(".scroll, svg") && getComputedStyle(e).position !== "absolute";
    }).map((e) => e.tagName + "." + e.className).slice(0, 3);
    const chart = page.querySelector(".chart svg[data-x0]");
    let tip = "";
    if (chart) {
      const box = chart.getBoundingClientRect();
      const at = { clientX: box.left + box.width * 0.6, clientY: box.top + 20, bubbles: true };
      chart.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", at));
      tip = page.querySelector(".tip").textContent;
    }
    const style = frame.contentWindow.getComputedStyle(page.body);
    found.push({ width, page: page.documentElement.scrollWidth, wide, tip, errors, text: page.body.innerText.length,
      colour: style.color, back: style.backgroundColor, planted: String(frame.contentWindow.planted),
      pictures: [...page.images].filter((image) => !image.naturalWidth).length });
    frame.remove();
  }
  const result = document.createElement("pre");
  result.id = "found";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
})();
</script></body>"""


def opened(page, folder, widths=(400, 1280, 2560), dark=False):
    """What a page is at some widths, and the lines of the browser's console.

    Args:
        page: path of the page.
        folder: for the files of the browser.
        widths: in pixels.
        dark: with the dark colours.
    """
    harness = folder / "harness.html"
    text = _HARNESS.replace("WIDTHS", json.dumps(list(widths)))
    harness.write_text(text.replace("ADDRESS", json.dumps(page.resolve().as_uri())))
    command = [
        browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=20000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=2700,1000", "--dump-dom",
        harness.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(match[1])), console
