"""The site of the documentation: it is built without a warning, whole, and does what it says."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer

import kappa_fast
from kappa_fast.cli import app
from kappa_fast.cli.demo import find_weights

LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}
DESCRIBING = {"canonical", "next", "prev"}  # links that a browser does not follow by itself


class Page(HTMLParser):
    """What a page offers to links, and where its own lead."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        describes = tag == "link" and given.get("rel") in DESCRIBING
        self.loaded += [given[name] for name in given if (tag, name) in LOADED and not describes]


@pytest.fixture(scope="module")
def site(root, tmp_path_factory) -> Path:
    """The site as `make docs` builds it, where no address but this machine's can be reached."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=root,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[str, Page]:
    return {str(file.relative_to(site)): Page(file) for file in site.glob("*.html")}


def test_every_link_within_the_site_leads_to_a_file_and_an_anchor_that_exist(site, pages):
    lost = []
    for name, page in pages.items():
        for link in {*page.links, *page.loaded}:
            found = urlsplit(link)
            if found.scheme or found.netloc or name == "404.html":  # which is served at any depth
                continue
            target = os.path.normpath(os.path.join(os.path.dirname(name), unquote(found.path))) if found.path else name
            target = "index.html" if target == "." else target
            anchor = unquote(found.fragment)
            known = target in pages and (not anchor or anchor in pages[target].anchors)
            if not (known or (target not in pages and not anchor and (site / target).is_file())):
                lost.append((name, link))
    assert lost == []


def test_no_page_loads_anything_from_elsewhere(pages):
    found = {link for page in pages.values() for link in page.loaded if urlsplit(link).netloc}
    assert found == set()


def test_every_page_is_in_the_navigation(root, site, pages):
    built = {f"{file.stem}.html" for file in (root / "docs").glob("*.md")} | {"changelog.html", "contributing.html"}
    assert built <= set(pages)
    text = (site / "index.html").read_text()
    navigation = text[text.index('<nav class="md-nav md-nav--primary') : text.index('<div class="md-content"')]
    assert set(re.findall(r'href="([\w-]+\.html)"', navigation)) == built


def test_every_public_name_has_a_place_in_the_reference(pages):
    assert [name for name in kappa_fast.__all__ if f"kappa_fast.{name}" not in pages["api.html"].anchors] == []


def test_every_parameter_of_public_functions_has_a_line_in_the_reference(site):
    text = (site / "api.html").read_text()
    for name in ("rank", "plan", "wrap", "difference"):
        part = text[text.index(f'id="kappa_fast.{name}"') :].partition("</h3>")[2].partition("<h3")[0]
        described = set(re.findall(r"<li[^>]*>\s*<b><code>\*{0,2}(\w+)</code></b>", part))
        parameters = set(inspect.signature(getattr(kappa_fast, name)).parameters)
        assert parameters - described - {"model", "selection"} == set(), name


def test_the_page_of_the_command_line_has_every_option_of_every_command(site):
    text = (site / "commands.html").read_text()
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        part = text[text.index(f'id="kappa-fast-{name}"') :].partition("</h2>")[2].partition("<h2")[0]
        listed = set(re.findall(r"--[a-z-]+", re.sub(r"<[^>]+>", "", part)))
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}
        assert options - {"--help"} <= listed, name


def test_what_a_docstring_says_of_several_names_is_said_of_each(root, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(root / "docs" / "tools")
    import griffe
    from docstrings import OneEntryEach

    (tmp_path / "several.py").write_text(
        'def f(a, b, c, d):\n    """Do it.\n\n    Args:\n        a, ..., c: three\n            of them.\n'
        '        d: one.\n\n    Raises:\n        ValueError: why.  TypeError: why not.\n    """\n'
    )
    module = griffe.load("several", search_paths=[tmp_path], extensions=griffe.load_extensions(OneEntryEach))
    arguments, errors = module["f"].docstring.parse("google", warnings=False)[1:]
    assert [item.name for item in arguments.value] == ["a", "b", "c", "d"]
    assert {item.description for item in arguments.value} == {"three\nof them.", "one."}
    assert [str(item.annotation) for item in errors.value] == ["ValueError", "TypeError"]


@pytest.mark.parametrize("name", ["first-ranking", pytest.param("first-training", marks=pytest.mark.long)])
def test_the_python_of_the_first_pages_runs_as_written(name, root, run_python, tmp_path):
    (example,) = re.findall(
        r"^```python\n(.+?)^```", (root / "docs" / f"{name}.md").read_text(), re.DOTALL | re.MULTILINE
    )
    said = run_python(example, cwd=tmp_path, env={"PYTHONPATH": str(root)})
    if name == "first-ranking":
        assert len(kappa_fast.Ranking.from_json(tmp_path / "ranking.json")) > 10
        return
    moved = set(said.partition("moved:\n")[2].split())
    assert moved
    assert all(re.search(r"layers\.\d\.(mlp|self_attn)", parameter) for parameter in moved)


def test_the_options_table_lists_the_options_of_rank_with_their_defaults(root):
    table = (root / "docs" / "options.md").read_text().partition("# Options of rank()")[2].partition("\n\n[The API")[0]
    listed = {}
    for names, defaults in re.findall(r"^\| (`.+?) \| (.+?) \|", table, re.MULTILINE):
        parts = re.findall(r"`(\w+)`", names)
        values = [eval(value) for value in defaults.split(", ")]
        listed |= dict(zip(parts, values * len(parts) if len(values) == 1 else values, strict=True))
    parameters = inspect.signature(kappa_fast.rank).parameters.items()
    reserved = {"source", "process_group"}
    assert listed == {name: parameter.default for name, parameter in parameters if name not in reserved}


@pytest.mark.parametrize("document", ["README.md", "docs/commands.md", "docs/first-ranking.md", "docs/planning.md"])
def test_every_command_line_uses_options_that_exist(document, root, capsys):
    lines = re.findall(r"^    kappa-fast (\w+)(.*)$", (root / document).read_text(), re.MULTILINE)
    assert lines
    if document == "docs/commands.md":
        assert {command for command, _ in lines} == set(typer.main.get_command(app).commands)
    for command, rest in lines:
        with pytest.raises(SystemExit):
            app([command, "--help"], prog_name="kappa-fast")
        shown = capsys.readouterr().out
        for option in re.findall(r"--[a-z-]+", rest):
            assert re.search(rf"^ +{option}\b", shown, re.MULTILINE), option


@pytest.mark.parametrize("document", ["README.md", "docs/commands.md"])
def test_the_commands_work_one_after_the_other(document, root, tmp_path, monkeypatch, capsys):
    """On a real model; what was ranked before and after training stands for the two that are compared."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(find_weights(), "model.safetensors")
    lines = re.findall(r"^    kappa-fast (.*)$", (root / document).read_text(), re.MULTILINE)
    commands = [shlex.split(line, comments=True) for line in lines]
    commands = [command for command in commands if not {"org/name", "demo"} & set(command)]
    assert [command[0] for command in commands][:2] == ["plan", "rank"]
    for command in commands:
        given = ["model.safetensors" if word == "checkpoint/" else word for word in command]
        if command[0] == "compare":
            for name in ("before.json", "after.json"):
                shutil.copy("ranking.json", name)
        with pytest.raises(SystemExit) as stop:
            app(given, prog_name="kappa-fast")
        assert not stop.value.code, capsys.readouterr().err
    assert Path("ranking.html").stat().st_size > 10_000
    if "export" in {command[0] for command in commands}:
        assert "unfrozen_parameters:" in capsys.readouterr().out


def test_every_extra_is_in_the_table_or_for_those_who_work_on_the_library(root):
    import tomllib

    extras = set(tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    table = (root / "docs" / "options.md").read_text().partition("## Extras")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == extras - {"bench", "dev", "docs", "test"}
