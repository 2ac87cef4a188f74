"""Text from files and paths, made safe for each place where it is shown."""

import html
import json
import re
import unicodedata
from typing import Any

from rich.markup import escape

from lplr_jax.printing import printable


def safe(text: Any) -> str:
    r"""Return text for a terminal where rich reads markup: neither controls nor markup of it act.

    Example:
        >>> safe("[red]a" + chr(27) + "[2J")
        '\\[red]a\\x1b[2J'
    """
    shown = escape(printable(text))
    # A backslash at the end would make text of the markup behind it.
    return shown + " " if shown.endswith("\\") else shown


def safe_html(text: Any) -> str:
    """Return text for a page of HTML.

    Example:
        >>> safe_html("<b>&")
        '&lt;b&gt;&amp;'
    """
    return html.escape(printable(text))


def safe_markdown(text: Any) -> str:
    r"""Return text for a cell or a line of Markdown: it ends no cell, and begins no tag, link or code.

    Example:
        >>> safe_markdown("a|b <i>")
        'a\\|b &lt;i>'
    """
    shown = printable(text).replace("\\", "\\\\").replace("<", "&lt;")
    shown = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", shown)  # one within a word begins no emphasis
    return "".join(f"\\{sign}" if sign in "|`[]*~" else sign for sign in shown)


def safe_json(content: Any) -> str:
    r"""Return JSON for a terminal: letters of any language as they are, what would steer a terminal as escapes.

    Example:
        >>> safe_json({"λ": chr(0x9B) + "2J" + chr(0x202E)})
        '{\n  "λ": "\\u009b2J\\u202e"\n}'
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    # Only in strings can there be any: JSON's own signs are ASCII.
    return "".join(json.dumps(letter)[1:-1] if _steers(letter) else letter for letter in text)


def _steers(letter: str) -> bool:
    return letter != "\n" and unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
