"""The report as a browser shows it, in light and dark."""

import subprocess
from pathlib import Path

import pytest

from sglang_ext.tools.report.observed import Observed
from sglang_ext.tools.report.server import server_page
from sglang_ext.tools.scrape import Metrics
from tests.conftest import ROOT
from tests.tools.report_texts import later, text

WIDE, NARROW = (1280, 2400), (420, 6000)
LOOK = """<script>
addEventListener("load", () => {
  const box = document.documentElement, faults = [];
  if (box.scrollWidth > innerWidth) faults.push("wider than the window");
  for (const said of document.querySelectorAll("svg text")) {
    const inner = said.getBoundingClientRect();
    const outer = said.closest("svg").getBoundingClientRect();
    if (inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.top < outer.top - 4
        || inner.bottom > outer.bottom + 4) faults.push("cut off: " + said.textContent);
  }
  for (const bar of document.querySelectorAll("svg rect")) {
    const color = getComputedStyle(bar).fill;
    if (color === "rgb(0, 0, 0)") faults.push("without a color: " + bar.textContent);
  }
  const asked = performance.getEntriesByType("resource").map(each => each.name);
  const colors = ["color", "backgroundColor"].map(name => getComputedStyle(document.body)[name]);
  box.dataset.seen = JSON.stringify({faults, asked, colors});
  document.body.replaceChildren(box.dataset.seen);
});
</script></head>"""
"""Looks at the page from inside, and leaves what it has seen in its place."""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Debian's, unpacked."""
    place = tmp_path_factory.mktemp("chromium")
    subprocess.run(["sh", str(ROOT / "launch" / "chromium.sh"), str(place)], check=True)
    return place / "chromium"


def seen(chromium: Path, page: Path, size: tuple[int, int], *options: str) -> str:
    """The page's document, once it was shown."""
    width, height = size
    command = [str(chromium), f"--user-data-dir={page.parent / 'data'}", "--dump-dom"]
    command += [f"--window-size={width},{height}", *options, f"file://{page}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return shown.stdout


@pytest.mark.full
def test_nothing_is_cut_off_or_asked_for_in_light_and_dark(chromium: Path, tmp_path: Path) -> None:
    observed = Observed([0.0, 2.0, 4.0], [Metrics(text()), Metrics(later()), Metrics(later())])
    written = server_page(observed, "http://127.0.0.1:30000", "2026-01-01")
    page = tmp_path / "report.html"
    page.write_text(written.replace("</head>", LOOK))
    dark = "--blink-settings=preferredColorScheme=0"
    for size in (WIDE, NARROW):
        light = seen(chromium, page, size)
        assert '"faults":[],"asked":[]' in light, light[-600:]
        assert "rgb(246, 247, 249)" in light
        in_dark = seen(chromium, page, size, dark)
        assert '"faults":[],"asked":[]' in in_dark, in_dark[-600:]
        assert "rgb(15, 20, 27)" in in_dark


@pytest.mark.full
def test_what_is_cut_off_is_seen(chromium: Path, tmp_path: Path) -> None:
    """The look itself can fail."""
    page = tmp_path / "report.html"
    cut = '<svg viewBox="0 0 100 20"><text x="90" y="15">a long text</text><rect width="9"/></svg>'
    page.write_text(f"<html><head>{LOOK}<body>{cut}</body></html>")
    said = seen(chromium, page, WIDE)
    assert "cut off: a long text" in said
    assert "without a color" in said
