"""Text from files and paths, made safe for each place where it is shown."""

import html
from typing import Any

from rich.markup import escape

from lplr_jax import checks


def safe(text: Any) -> str:
    r"""Return text for a terminal where rich reads markup: neither controls nor markup of it act.

    Example:
        >>> safe("[red]a" + chr(27) + "[2J")
        '\\[red]a\\x1b[2J'
    """
    shown = escape(checks.printable(text))
    # A backslash at the end would make text of the markup behind it.
    return shown + " " if shown.endswith("\\") else shown


def safe_html(text: Any) -> str:
    """Return text for a page of HTML.

    Example:
        >>> safe_html("<b>&")
        '&lt;b&gt;&amp;'
    """
    return html.escape(checks.printable(text))


def safe_markdown(text: Any) -> str:
    r"""Return text for a cell or a line of Markdown: it ends no cell, and begins no tag, link or code.

    Example:
        >>> safe_markdown("a|b <i>")
        'a\\|b &lt;i>'
    """
    shown = checks.printable(text).replace("\\", "\\\\").replace("<", "&lt;")
    return "".join(f"\\{sign}" if sign in "|`[]" else sign for sign in shown)
