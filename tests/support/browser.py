"""A real browser for the tests of the page: whatever chromium the machine has, headless and without a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-quic"),
]
MISSING = "no chromium found: install one (apt-get install chromium), or name it in KAPPA_FAST_CHROMIUM"


def find_chromium() -> str | None:
    """The browser that KAPPA_FAST_CHROMIUM names, else the first that is on the path."""
    named = os.environ.get("KAPPA_FAST_CHROMIUM")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """A playwright browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=OPTIONS)
        try:
            yield browser
        finally:
            browser.close()


class View:
    """A page in the browser, with all it asked for and all it complained about."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(file.as_uri())

    def close(self) -> None:
        self.page.close()

    def rows(self) -> list[tuple[int, dict[str, str]]]:
        """All rows of the table in order, as (position in the ranking, text by column), read while scrolling."""
        found = {place: (position, cells) for place, position, cells in self.page.evaluate(READ_ROWS)}
        total = int(self.page.get_attribute("#rows table", "aria-rowcount")) - 1
        assert sorted(found) == list(range(total)), f"{len(found)} of {total} rows can be reached"
        return [found[place] for place in range(total)]

    def positions(self) -> list[int]:
        return [position for position, _ in self.rows()]

    def sort(self, column: str) -> None:
        self.page.click(f'#rows th[data-name="{column}"] button')

    def set_budget(self, kind: str, value: float) -> None:
        self.page.select_option("#cut-kind", kind)
        self.page.fill("#cut-value", repr(value))

    def chosen(self) -> list[int]:
        """The positions that the budget takes, read from the table."""
        self.page.check("#filter-chosen")
        found = self.positions()
        self.page.uncheck("#filter-chosen")
        return found


READ_ROWS = """async () => {
  const box = document.getElementById("rows");
  const frame = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  const found = [];
  for (let top = 0; ; top += box.clientHeight) {
    box.scrollTop = top;
    await frame();
    for (const row of box.querySelectorAll("tbody tr[data-position]")) {
      const cells = [...row.children].map((cell) => [cell.classList[0], cell.textContent]);
      const place = Number(row.getAttribute("aria-rowindex")) - 2;
      found.push([place, Number(row.dataset.position), Object.fromEntries(cells)]);
    }
    if (box.scrollTop + box.clientHeight >= box.scrollHeight - 1) return found;
  }
}"""

# Text and background of every element that shows a text of its own, as [words, [r, g, b], [r, g, b]].
READ_COLORS = r"""() => {
  const parse = (color) => {
    const numbers = color.match(/[\d.]+/g).map(Number);
    return { channels: numbers.slice(0, 3), alpha: numbers.length > 3 ? numbers[3] : 1 };
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const { channels, alpha } = parse(getComputedStyle(at).backgroundColor);
      if (alpha === 1) return channels;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const words = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join(" ").trim();
    const box = element.getBoundingClientRect();
    if (!words || !box.width || element.closest("script, noscript, option") || element.disabled) continue;
    const style = getComputedStyle(element);
    const ink = element instanceof SVGElement ? style.fill : style.color;
    found.push([words.slice(0, 40), parse(ink).channels, behind(element)]);
  }
  return found;
}"""


def contrast(first: list[float], second: list[float]) -> float:
    """The contrast of two sRGB colors with channels up to 255 (WCAG 2, "contrast ratio")."""

    def luminance(color: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in color)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
