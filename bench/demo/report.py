"""The demo's page: one self-contained HTML file."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k5kernels.atomic import replacing

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
table { border-collapse: collapse; margin: 1rem 0 } caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { border-bottom: 1px solid #d0d7de; padding: .3rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left } img, video { max-width: 100% } h2 { margin-top: 2.5rem }
.note { color: #57606a }
"""


@dataclass(frozen=True)
class Table:
    """A caption, column names with units, rows of text, and what to know when reading it."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def html(self) -> str:
        """The table as an HTML fragment, its text escaped."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in self.rows
        )
        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        return f"<table><caption>{html.escape(self.caption)}</caption><tr>{head}</tr>\n{body}</table>{note}"


Section = tuple[str, Sequence[Table | Path]]  # a heading, tables and PNG files


def _embedded(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def write_report(path: Path, title: str, facts: str, video: Path, video_note: str, sections: Sequence[Section]) -> None:
    """Write the page. sections: in reading order."""
    parts = [f"<h1>{html.escape(title)}</h1><p class='note'>{html.escape(facts)}</p>"]
    parts.append(f"<video controls loop muted autoplay src='{_embedded(video, 'video/mp4')}'></video>")
    parts.append(f"<p class='note'>{html.escape(video_note)}</p>")
    for heading, items in sections:
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        for item in items:
            parts.append(
                item.html() if isinstance(item, Table) else f"<img alt='' src='{_embedded(item, 'image/png')}'>"
            )
    page = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
    with replacing(path) as partial:
        partial.write_text(f"{page}<style>{STYLE}</style>\n" + "\n".join(parts) + "</html>\n")
