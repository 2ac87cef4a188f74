"""Text from elsewhere made fit to be shown: one line, without anything that steers a screen or a label."""

import unicodedata
from typing import Any


def printable(text: Any) -> str:
    r"""Return text from a file or a path for a label or a screen: one line, without anything that steers either.

    Controls, right-to-left marks, zero-width characters, surrogates and private ones are written as escapes, white
    space as blanks. Whoever reads markup (rich, HTML, LaTeX) must still escape its own signs.

    Example:
        >>> printable("a\tb" + chr(27) + "[2J" + chr(0x202E))
        'a b\\x1b[2J\\u202e'
    """

    def shown_as(character: str) -> str:
        if character.isspace():
            return " "
        return ascii(character)[1:-1] if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co") else character

    return "".join(map(shown_as, str(text)))
