"""The HTML of a report: one file, no script, nothing fetched. Every text passes through `html.escape` here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { --ink: #1b1f24; --soft: #5a6572; --line: #d8dde3; --paper: #fff; --tint: #f4f6f8; --mark: #0072b2;
  --warn: #8a5300; --warn-tint: #fff6e5; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa5b1; --line: #343b44; --paper: #15181c;
  --tint: #1d2227; --mark: #56b4e9; --warn: #f0c36d; --warn-tint: #2b2416; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 58rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .7rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0; max-width: 44rem; }
.about, figcaption, .small { color: var(--soft); font-size: .875rem; }
.headline { font-size: 1.2rem; line-height: 1.4; margin: 1.3rem 0; padding-left: .9rem;
  border-left: 4px solid var(--mark); }
.warning { background: var(--warn-tint); color: var(--warn); padding: .5rem .8rem; border-radius: 4px; margin: .5rem 0;
  font-size: .9rem; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .32rem 1.1rem .32rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { font-weight: 600; border-bottom: 2px solid var(--line); white-space: nowrap; }
tbody th { font-weight: 400; }
td.number, th.number { text-align: right; white-space: nowrap; }
tr.strong > * { font-weight: 600; }
figure { margin: .8rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { margin-top: .35rem; max-width: 44rem; }
figure.large { overflow-x: auto; } figure.large img { width: 100%; min-width: 36rem; max-width: none; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: .4rem 1rem; }
.grid figure img { width: 100%; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--mark); }
ul { padding-left: 1.2rem; margin: .5rem 0; } li { margin: .15rem 0; max-width: 44rem; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } figure, table, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .wide, figure.large { overflow: visible; } figure.large img { min-width: 0; } }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_PATH = re.compile(r"""(?:[A-Za-z]:)?[^\s'"=:,;()<>]*[/\\][^\s'":,;()<>]*""")
_FILE = re.compile(r"\S+\.(?:nii|nrrd|nhdr|mha|mhd|dcm|ima)\b(?:\.gz)?", re.IGNORECASE)


def page(title: str, about: str, body: Iterable[str]) -> str:
    """A whole document; `body` is HTML, the other arguments are text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1><p class="about">{escape(about)}</p></header>\n<main>\n'
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *body: str) -> str:
    """A titled section of HTML parts; nothing where all parts are empty."""
    content = "\n".join(part for part in body if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def subsection(title: str, *body: str) -> str:
    """A heading of the third level with what stands under it."""
    return f"<h3>{escape(title)}</h3>\n" + "\n".join(body)


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of text, nothing for none; `p < 0.001` is kept on one line."""
    text = re.sub(r"\bp ([<=]) ", "p\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", text)
    if not text:
        return ""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def warnings(lines: Iterable[str]) -> str:
    """A marked paragraph for every line."""
    return "\n".join(f'<p class="warning" role="note">{escape(line)}</p>' for line in lines)


def bullets(lines: Sequence[str]) -> str:
    """A list; nothing for no lines."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def details(summary: str, *body: str) -> str:
    """Parts behind a summary that a click opens; nothing for no parts."""
    content = "\n".join(part for part in body if part)
    return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>" if content else ""


def table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], *, text_columns: int = 1, strong: Iterable[int] = ()
) -> str:
    """A table of text cells; columns after the first `text_columns` hold numbers, rows named in `strong` are bold."""
    bold = set(strong)

    def cells(values: Sequence[Any], tag: str) -> str:
        made = []
        for i, value in enumerate(values):
            name = "th" if tag == "th" or i == 0 else "td"
            scope = f' scope="{"col" if tag == "th" else "row"}"' if name == "th" else ""
            number = ' class="number"' if i >= text_columns else ""
            made.append(f"<{name}{scope}{number}>{escape(str(value))}</{name}>")
        return "".join(made)

    lines = [
        f'<tr class="strong">{cells(row, "td")}</tr>' if i in bold else f"<tr>{cells(row, 'td')}</tr>"
        for i, row in enumerate(rows)
    ]
    if not lines:
        return ""
    heading = f"<thead><tr>{cells(head, 'th')}</tr></thead>" if any(head) else ""
    return f'<div class="wide"><table>{heading}<tbody>\n' + "\n".join(lines) + "\n</tbody></table></div>"


def facts(items: Mapping[str, Any]) -> str:
    """A two-column table of what is known, blanks left out."""
    known = [(key, value) for key, value in items.items() if value not in (None, "", (), [], {})]
    return table(("", ""), known, text_columns=2)


def figure(uri: str, alt: str, caption: str = "", *, large: bool = False) -> str:
    """An image given as a data URI; a `large` one fills the page, and on a phone scrolls instead of shrinking."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    kind = ' class="large"' if large else ""
    return f'<figure{kind}><img src="{escape(uri)}" alt="{escape(alt)}">{below}</figure>'


def grid(*figures: str) -> str:
    """Figures side by side; nothing for none."""
    shown = [each for each in figures if each]
    return '<div class="grid">' + "\n".join(shown) + "</div>" if shown else ""


def without_files(text: Any, known: Iterable[str] = ()) -> str:
    """The text with file and folder names blanked, since they can hold a patient's name.

    Args:
        text: what to show.
        known: names to blank, wherever they stand; anything else that looks like a path or a volume goes as well.
    """
    shown = str(text)
    for name in sorted(filter(None, known), key=len, reverse=True):
        shown = shown.replace(name, "[file]")
    return re.sub(r"\[file\](?:\S*\[file\])+", "[file]", _FILE.sub("[file]", _PATH.sub("[file]", shown)))


def last_parts(text: Any) -> str:
    """The text with each path cut down to its last part: enough to know a run or data set by."""
    return _PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], str(text))


def readable(value: Any) -> str:
    """A value from a JSON or YAML file as a person would write it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {readable(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        joint = " x " if value and all(isinstance(each, (int, float)) for each in value) else ", "
        return joint.join(
            f"({readable(each)})" if isinstance(each, (list, tuple)) else readable(each) for each in value
        )
    return str(value)
