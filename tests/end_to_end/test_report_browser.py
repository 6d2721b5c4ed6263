"""The report in a real browser: it renders, its script runs, it asks nobody for anything, it fits narrow windows."""

from __future__ import annotations

import functools
import html
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from experiments import report

_SPEC = importlib.util.spec_from_file_location("report_fixture", Path(__file__).parents[1] / "report_fixture.py")
fixture = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fixture)

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no browser: install chromium (Debian: apt-get install chromium)"
)

# The report's own security policy lets no foreign script in, so a page around it looks inside.
_PROBE = """<!DOCTYPE html><html><body style="margin:0">
<iframe src="{source}" {sandbox} style="width:{width}px;height:900px;border:0"></iframe><pre id="found"></pre><script>
document.querySelector("iframe").addEventListener("load", (event) => {{
  const page = event.target.contentDocument, root = page.documentElement, view = event.target.contentWindow;
  const all = (name) => [...page.querySelectorAll(name)];
  const seen = (name) => all(name).filter((node) => node.getBoundingClientRect().width > 0);
  const shown = (name) => all(name).filter((node) => view.getComputedStyle(node).display !== "none");
  const isWider = (node) => node.getBoundingClientRect().right > root.clientWidth + 1;
  const fontSize = (node) => parseFloat(view.getComputedStyle(node).fontSize) * node.getScreenCTM().a;
  const curves = seen("svg[data-geometry]")[0], box = curves.getBoundingClientRect();
  const at = {{clientX: box.left + box.width / 2, clientY: box.top + box.height / 2, bubbles: true}};
  curves.dispatchEvent(new view.PointerEvent("pointermove", at));
  document.getElementById("found").textContent = JSON.stringify({{
    scrollWidth: root.scrollWidth, clientWidth: root.clientWidth, height: root.scrollHeight,
    wider: seen("main *").filter((node) => !node.closest("svg, .scroll, pre") && isWider(node)).length,
    wide: shown("svg.wide").length, narrow: shown("svg.narrow").length, contents: shown("nav").length,
    charts: seen("svg.chart").length, titles: all("svg.chart title").length, words: page.body.innerText,
    download: page.getElementById("download").href.slice(0, 5), tip: page.getElementById("tip").textContent,
    requests: view.performance.getEntriesByType("resource").map((entry) => entry.name),
    paper: view.getComputedStyle(page.body).backgroundColor,
    smallest: Math.min(...seen("svg.chart text").map(fontSize)),
  }});
}});
</script></body></html>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(fixture.write_run(tmp_path_factory.mktemp("run"), steps=60))


def _dump(address: Path, profile: Path, *options: str) -> str:
    command = [
        str(BROWSER),
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *(
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
        ),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files", f"--user-data-dir={profile}"),
        *("--window-size=1400,1000", "--virtual-time-budget=5000", *options, "--dump-dom", address.as_uri()),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def look(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the probe finds in a window of a width, light or dark."""

    @functools.cache
    def found(width: int, *options: str, sandbox: str = "") -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("browser")
        probe = folder / "probe.html"
        probe.write_text(_PROBE.format(source=page.as_uri(), width=width, sandbox=sandbox), encoding="utf-8")
        dom = _dump(probe, folder / "profile", *options)
        return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.S).group(1)))

    return found


@pytest.mark.parametrize("width", [390, 768, 1400])
def test_page_never_scrolls_sideways(look: Any, width: int) -> None:
    found = look(width)
    assert found["clientWidth"] == width
    assert found["scrollWidth"] <= width
    assert found["wider"] == 0
    assert found["height"] > 3000


def test_narrow_windows_get_figures_drawn_for_them(look: Any) -> None:
    narrow, wide = look(390), look(1400)
    assert narrow["wide"] == 0 < narrow["narrow"]
    assert wide["narrow"] == 0 < wide["wide"]
    assert (narrow["contents"], wide["contents"]) == (0, 1)


@pytest.mark.parametrize("width", [390, 1400])
def test_letters_in_figures_stay_readable(look: Any, width: int) -> None:
    assert look(width)["smallest"] >= 8.5  # CSS pixels


def test_script_runs_and_shows_losses_under_the_pointer(look: Any) -> None:
    found = look(1400)
    assert found["titles"] == 0  # turned into tool tips
    assert found["download"] == "blob:"
    assert found["tip"].startswith("step 30\n")
    assert found["tip"].count("\n") == 5  # one line an arm


def test_page_asks_nobody_for_anything(look: Any) -> None:
    assert look(1400)["requests"] == []


def test_dark_mode_is_followed(look: Any) -> None:
    light, dark = look(1400), look(1400, "--blink-settings=preferredColorScheme=0")
    assert light["paper"] == "rgb(255, 255, 255)"
    assert dark["paper"] == "rgb(20, 24, 28)"


def test_page_is_complete_without_scripts(look: Any) -> None:
    found, with_scripts = look(1400, sandbox='sandbox="allow-same-origin"'), look(1400)
    assert found["titles"] > 100  # the browser's own tool tips
    assert found["charts"] == with_scripts["charts"] > 12
    assert "too few seeds for a claim" in found["words"]
    assert "All data is in this file" in found["words"]
