"""A page: sections of prose, tables and pictures in one HTML file that needs no network.

The file carries its style sheet and its only script (``page.js``: tables that sort) and forbids itself, by a
content security policy, to load anything else. Light or dark follows the reader's system; at phone width
tables scroll in their frames and pictures shrink; on paper it is black on white.

Text is put together with `markupsafe.Markup`: what is formatted into it is escaped, so a layer or a token
that is called ``<script>`` stays a name. Pictures are SVG written by ``fewbit.report.chart``: their colours
are those of the style sheet, in the dark as well, and each point says its figures under the mouse.

Roads not taken: pictures by matplotlib (colours are written into every path, points carry no text, and a
scatter of 200 layers is ten times as large); plotly (a script of 4 MB in every file); a template engine (one
page, whose parts are functions).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from fewbit.errors import InputError

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_PAGE = Markup("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header><h1>{title}</h1></header>
{contents}
<main>
{sections}
</main>
<footer>Written by fewbit {version}.</footer>
<script>
{script}</script>
</body>
</html>
""")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands under it: paragraphs (str, escaped) and parts of a page (Markup)."""

    title: str
    parts: Sequence[str | Markup]


def page(title: str, sections: Sequence[Section]) -> str:
    """The text of a self-contained HTML file; with more than two sections it lists them on top."""
    if not sections:
        raise InputError(f"the report {title!r} has no section; give it at least one")
    links = Markup("").join(
        Markup('<li><a href="#s{}">{}</a></li>').format(i, s.title) for i, s in enumerate(sections)
    )
    contents = (
        Markup('<nav aria-label="Sections"><ul>{}</ul></nav>').format(links) if len(sections) > 2 else ""
    )
    return str(
        _PAGE.format(
            policy=_POLICY,
            title=title,
            style=_asset("page.css"),
            script=_asset("page.js"),
            version=version("fewbit"),
            contents=contents,
            sections=Markup("\n").join(_section(i, s) for i, s in enumerate(sections)),
        )
    )


def write(path: Path, text: str) -> None:
    """Put a page on disk; the file appears when it is complete.

    Raises ``InputError`` for a folder that is not there and a path that cannot be written.
    """
    check_path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"the report {path} cannot be written ({error.strerror}); give another path"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def check_path(path: Path) -> None:
    """Refuse what `write` would refuse before anything is computed."""
    if not path.absolute().parent.is_dir():
        raise InputError(f"folder {path.parent} for the report does not exist; make it first")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file, such as {path}/report.html")


def facts(rows: Iterable[tuple[str, str | Markup]]) -> Markup:
    """Labels and what they say: what a reader wants to know first."""
    pairs = (Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(name, text) for name, text in rows)
    return Markup('<dl class="facts">{}</dl>').format(Markup("").join(pairs))


def _section(i: int, section: Section) -> Markup:
    parts = (p if isinstance(p, Markup) else Markup("<p>{}</p>").format(p) for p in section.parts)
    body = Markup("\n").join(parts)
    return Markup('<section id="s{}" aria-labelledby="h{}">\n<h2 id="h{}">{}</h2>\n{}\n</section>').format(
        i, i, i, section.title, body
    )


def _asset(name: str) -> Markup:
    """A file that lies beside this one, as it is."""
    return Markup(files("fewbit.report").joinpath(name).read_text(encoding="utf-8"))
