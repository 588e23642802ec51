from __future__ import annotations

import json
import sys
import unicodedata
from functools import cache

import pytest

from mnemosyned.observe.printable import printable, printable_block, printable_json, printable_value


@cache
def strange() -> str:
    """Every character of these categories; not made when the module is only collected."""
    categories = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    characters = (chr(number) for number in range(sys.maxunicode + 1))
    return "".join(one for one in characters if unicodedata.category(one) in categories)


def test_what_people_write_stays_as_it_is() -> None:
    text = "a b\\c ä ß 漢字 😀 «»"

    assert printable(text) == text


@pytest.mark.parametrize(
    ("character", "escape"),
    [("\x1b", r"\x1b"), ("\n", r"\n"), ("\x9b", r"\x9b"), ("\u202e", r"\u202e"), ("\ud800", r"\ud800")],
)
def test_what_is_not_printable_is_escaped(character: str, escape: str) -> None:
    assert printable(f"a{character}b") == f"a{escape}b"


def test_no_control_or_format_character_is_left() -> None:
    assert printable(strange()).isascii()
    assert printable_json(json.dumps(strange(), ensure_ascii=False)).isascii()


def test_json_means_the_same() -> None:
    text = strange().encode("utf-8", "ignore").decode()

    assert json.loads(printable_json(json.dumps({"a": text}, ensure_ascii=False))) == {"a": text}


def test_each_line_of_a_block_is_indented_and_printable() -> None:
    assert printable_block("a\n\x1bb\n", "| ") == "| a\n| \\x1bb"


def test_texts_within_json_are_made_printable() -> None:
    value = {"a\n": ["\x1b", 1, None, {"b": "\u202e"}]}

    assert printable_value(value) == {r"a\n": [r"\x1b", 1, None, {"b": r"\u202e"}]}
