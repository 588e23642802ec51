"""Rewrite the generated parts of the documents: `make docs`."""

from __future__ import annotations

import re
from pathlib import Path

from mnemosyned.config.help import flag_table
from mnemosyned.settings import SECTIONS

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Replace what stands between the markers."""
    readme = (ROOT / "README.md").read_text()
    code = (ROOT / "client" / "mnemosynerpc" / "example.py").read_text()
    body = code[code.index("def main") : code.index("\n\nif __name__")].rstrip() + "\n"
    readme = _between(readme, "<!-- example: client/mnemosynerpc/example.py -->\n", f"```python\n{body}```\n")
    (ROOT / "README.md").write_text(readme)
    flags = (ROOT / "docs" / "flags.md").read_text()
    table = _between(flags, "<!-- flags: made by `make docs` -->\n", flag_table(SECTIONS))
    (ROOT / "docs" / "flags.md").write_text(table)


def _between(text: str, start: str, content: str) -> str:
    pattern = re.escape(start) + r".*?(?=<!-- end -->)"
    return re.sub(pattern, lambda _: start + content, text, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    main()
