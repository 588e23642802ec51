"""Text of strangers, made harmless for logs and terminals. Pure.

A line break forges a log line, ESC and other control characters drive a terminal, and U+202E and other format
characters make a text look like another one. Each of them is replaced by its escape, as Python or JSON writes
it. What `str.isprintable` calls printable stays as it is: letters of every script, digits, signs and spaces.
"""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Return a text with `\x1b`, `\u202e` or `\n` for each character that is not printable."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _python_escape(one) for one in text)


def printable_json(rendered: str) -> str:
    r"""Return rendered JSON with `\u001b` and the like; what it means stays the same."""
    if rendered.isprintable():
        return rendered
    return "".join(one if one.isprintable() else _json_escape(one) for one in rendered)


def printable_block(text: str, indent: str) -> str:
    """Return a text with each of its lines printable and indented, so that none looks like one of the log."""
    return "\n".join(indent + printable(line) for line in text.rstrip("\n").split("\n"))


def printable_value(value: object) -> object:
    """Return what JSON knows, with every text in it printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable_value(key): printable_value(one) for key, one in value.items()}
    if isinstance(value, list):
        return [printable_value(one) for one in value]
    return value


def _python_escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", errors="surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
