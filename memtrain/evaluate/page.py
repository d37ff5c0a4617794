"""A page of HTML that needs nothing but itself."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

from memtrain.evaluate.slots import Firing, Slot


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #57606a; --paper: #ffffff;
  --line: #d8dee4; --shade: #f4f6f8; --accent: #0072b2; --mark: #ffe08a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --faint: #9aa4af; --paper: #15181c; --line: #333a42; --shade: #1e2328;
    --accent: #6cb8ea; --mark: #7a5c00; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2rem 1.2rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.9rem; margin: 0 0 .2rem; } h2 { font-size: 1.3rem; margin: 2.8rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p { max-width: 46rem; margin: .4rem 0 .8rem; } .faint { color: var(--faint); font-size: .92rem; }
figure { margin: .8rem 0; } img { width: 100%; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: 8px; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .32rem .9rem .32rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } th { font-weight: 600; color: var(--faint); font-size: .88rem; }
td.number, th.number { text-align: right; } tr.ours td { font-weight: 700; color: var(--accent); }
code, pre { font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--shade); border: 1px solid var(--line); border-radius: 8px; padding: .8rem;
  overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.scroll { max-height: 22rem; overflow-y: auto; } mark { background: var(--mark); color: inherit;
  border-radius: 3px; padding: 0 .1em; } .right { color: #1a7f37; } .wrong { color: #b35900; }
@media (prefers-color-scheme: dark) { .right { color: #56d364; } .wrong { color: #f0a050; } }
.slot { display: block; white-space: pre; } .facts { display: flex; flex-wrap: wrap; gap: .6rem;
  margin: 1.2rem 0; } .facts div { border: 1px solid var(--line); border-radius: 8px;
  padding: .5rem .9rem; } .facts b { display: block; font-size: 1.35rem; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--accent); }
"""


class Page:
    """Sections in the order in which they are added."""

    def __init__(self, title: str):
        self._title = title
        self._parts: list[str] = []

    def add(self, markup: str) -> None:
        """Markup as it is: whatever comes from outside was escaped before."""
        self._parts.append(markup)

    def section(self, title: str, text: str = "") -> None:
        self.add(f"<h2>{escape(title)}</h2>")
        if text:
            self.paragraph(text)

    def heading(self, title: str) -> None:
        self.add(f"<h3>{escape(title)}</h3>")

    def paragraph(self, text: str, *, faint: bool = False) -> None:
        self.add(f"<p{' class="faint"' if faint else ''}>{escape(text)}</p>")

    def image(self, png: bytes, description: str) -> None:
        data = base64.b64encode(png).decode()
        self.add(
            f'<figure><img alt="{escape(description)}" src="data:image/png;base64,{data}"></figure>'
        )

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Large numbers with what they are."""
        boxes = "".join(f"<div><b>{escape(n)}</b>{escape(what)}</div>" for n, what in facts)
        self.add(f'<div class="facts">{boxes}</div>')

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        *,
        numbers: Sequence[int] = (),
        ours: int | None = None,
    ) -> None:
        """Cells are text, or `Markup`. `numbers`: columns to be aligned right; `ours`: a row."""

        def row(cells: Sequence[Any], tag: str) -> str:
            return "".join(
                f"<{tag}{' class="number"' if i in numbers else ''}>{_cell(cell)}</{tag}>"
                for i, cell in enumerate(cells)
            )

        body = "".join(
            f"<tr{' class="ours"' if i == ours else ''}>{row(cells, 'td')}</tr>"
            for i, cells in enumerate(rows)
        )
        self.add(
            f'<div class="wide"><table><thead><tr>{row(columns, "th")}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def code(self, text: str, *, scroll: bool = False) -> None:
        self.add(f"<pre{' class="scroll"' if scroll else ''}>{escape(text)}</pre>")

    def folded(self, title: str, text: str) -> None:
        self.add(f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>")

    def render(self) -> str:
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self._title)}</title><style>{_STYLE}</style></head>\n<body>\n"
            + "\n".join(self._parts)
            + "\n</body></html>\n"
        )


class Markup(str):
    """Text that is markup already."""


def _cell(cell: Any) -> str:
    return cell if isinstance(cell, Markup) else escape(str(cell))


def escape(text: str) -> str:
    """Text for HTML. Control characters, which HTML does not allow, become visible ones."""
    shown = "".join(
        c if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160) else "\ufffd" for c in text
    )
    return html.escape(shown)


def visible(text: str) -> str:
    """One line of text in which line feeds and tabs can be seen."""
    return text.replace("\n", "\u21b5").replace("\t", "\u21e5").replace("\r", "\u240d")


def firing(found: Firing) -> Markup:
    """The text around a read, with the token that was read in a mark."""
    before, at, after = (escape(visible(part)) for part in (found.before, found.at, found.after))
    return Markup(f'<code class="slot">{before}<mark>{at}</mark>{after}</code>')


def slot_rows(slots: Sequence[Slot]) -> list[list[Any]]:
    return [
        [
            slot.slot,
            f"{100 * slot.share:.2f}%",
            f"{100 * slot.specificity:.0f}%",
            Markup("".join(firing(found) for found in slot.firings)),
        ]
        for slot in slots
    ]


def said(answer: str, wanted: str) -> Markup:
    """An answer, with whether it is right, told by more than its colour."""
    right = answer == wanted
    sign = "\u2713" if right else "\u2717"
    return Markup(
        f'<code class="{"right" if right else "wrong"}">{escape(visible(answer))} {sign}</code>'
    )
