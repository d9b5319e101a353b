"""Hooks of mkdocs: pages made of files beside docs/, links that lead out of docs/, and the reference of the commands.

The pages are written for whoever reads them in the repository. Where they link to a file of the repository, the site
has a copy of that file, so that every link works without a network.
"""

from __future__ import annotations

import posixpath
import re
from html import escape
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
COPIES = "repository"  # the folder of the site for files of the repository
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
INSTEAD = {**PAGES, "README.md": "index.md"}
COMMANDS = "<!-- commands -->"

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
_FENCE = re.compile(r"(^ *```.*?^ *```)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie at the top of the repository, and what any page links to there."""
    for origin, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / origin)))
    wanted = set()
    for file in files.documentation_pages():
        wanted |= {_target(file.src_uri, link) for link in _LINK.findall(_prose(file.content_string))}
    for path in sorted(wanted):
        if _is_copied(path):
            files.append(File.generated(config, _copy(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to files of the repository to their copies, and write the commands where they belong."""
    here = page.file.src_uri
    parts = _FENCE.split(markdown)
    parts[::2] = [_LINK.sub(lambda found: _turned(here, found[1]), part) for part in parts[::2]]
    text = "".join(parts)
    return text.replace(COMMANDS, commands()) if COMMANDS in text else text


def _prose(markdown: str) -> str:
    return "".join(_FENCE.split(markdown)[::2])


def _target(page: str, link: str) -> str:
    """What a link leads to, as a path in the repository."""
    origin = next((origin for origin, name in PAGES.items() if name == page), f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def _is_copied(path: str) -> bool:
    return not path.startswith(("docs/", "../")) and path not in INSTEAD and (ROOT / path).is_file()


def _copy(path: str) -> str:
    return f"{COPIES}/{path}" + (".txt" if path.endswith(".md") else "")


def _turned(page: str, link: str) -> str:
    """The link as the site needs it: relative to the page. What does not exist stays as it is, for mkdocs to report."""
    path = _target(page, link)
    if path in INSTEAD:
        found = INSTEAD[path]
    elif path.startswith("docs/"):
        found = path.removeprefix("docs/")
    elif _is_copied(path):
        found = _copy(path)
    else:
        return link
    return posixpath.relpath(found, posixpath.dirname(page) or ".")


def commands() -> str:
    """All commands with their arguments and options, as Markdown, from the program itself."""
    from kappa_fast.cli import app

    group: Any = typer.main.get_command(app)
    found = ["## kappa-fast", *_described(group, "kappa-fast")]
    for name, command in group.commands.items():
        found += [f"## kappa-fast {name}", *_described(command, f"kappa-fast {name}")]
    return "\n\n".join(found)


def _described(command: Any, name: str) -> list[str]:
    context = command.context_class(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    told = [_cell(part) for part in command.help.split("\n\n")]
    records: dict[str, list[str]] = {"Argument": [], "Option": []}
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None:
            left, right = (_cell(text) for text in record)
            records[parameter.param_type_name.capitalize()].append(f"| <code>{left}</code> | {right} |")
    tables = [f"| {kind} | |\n| --- | --- |\n" + "\n".join(rows) for kind, rows in records.items() if rows]
    return [f"```\n{usage}\n```", *told, *tables]


def _cell(text: str) -> str:
    """Text in which nothing is taken for markup."""
    plain = escape(" ".join(text.split()), quote=False)
    return re.sub(r"[|*_`\[\]]", lambda found: f"&#{ord(found[0])};", plain)
