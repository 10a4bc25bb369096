"""Pages of the site that the repository holds elsewhere: README, changelog, configs, their keys.

A hook of MkDocs (`mkdocs.yml`). Each text has one source, which GitHub shows as well.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Page of the site: sections of the README on it, "" being what stands before the first one.
README_PAGES = {
    "index.md": ["", "How it works", "What it beats", "What is tested where", "Where things are"],
    "install.md": ["Installing"],
    "commands.md": ["How to go on", "On a cluster"],
}
WHOLE_PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
LINK = re.compile(r"(\]\()(?!https?://|#)([^)\s]+)")
OUTWARD = re.compile(r"(\]\()\.\./([^)\s]+)")
NAMED_BY_FILE = re.compile(r"\[(?:docs/)?[\w-]+\.md\](\(([\w-]+\.md)(?:#[^)\s]*)?\))")


def sections(text: str) -> dict[str, str]:
    """The sections of a page by their headings of level 2, each with its heading."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    return {part[3:].partition("\n")[0] if part.startswith("## ") else "": part for part in parts}


def link_target(link: str) -> str:
    """Where a link of a file at the root of the repository leads on the site."""
    file, _, anchor = link.partition("#")
    whole = {source: page for page, source in WHOLE_PAGES.items()}
    if file == "README.md":
        return _readme_target(anchor)
    if file.startswith("configs/"):
        return f"recipes.md#{Path(file).stem}"
    return whole.get(file, file.removeprefix("docs/")) + (f"#{anchor}" if anchor else "")


def _readme_target(anchor: str) -> str:
    """The page with a section of the README; a section that begins its page needs no anchor."""
    for page, names in README_PAGES.items():
        slugs = [name.lower().replace(" ", "-") for name in names]
        if anchor in slugs:
            return page if anchor == slugs[0] else f"{page}#{anchor}"
    raise ValueError(f"README.md#{anchor}: the README has no such section")


def rewrite_links(text: str) -> str:
    """The text of a file at the root, with its links as those of a page of the site."""
    return LINK.sub(lambda match: match[1] + link_target(match[2]), text)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Pages of docs/ link to files beside that folder as GitHub needs it; lead to their pages.

    Where the text of a link is a file's name, the reader of the site gets the page's title.
    """
    led = OUTWARD.sub(lambda match: match[1] + link_target(match[2]), markdown)
    return name_by_title(led, {name: title for title, name in walk_nav(config["nav"])})


def name_by_title(markdown: str, titles: dict[str, str]) -> str:
    """`[data.md](data.md#shards)` as `[Data](data.md#shards)`; other links stay."""
    return NAMED_BY_FILE.sub(lambda found: f"[{titles[found[2]]}]{found[1]}", markdown)


def walk_nav(entries: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Title and page of each entry of a navigation, sections flattened."""
    pairs = [pair for entry in entries for pair in entry.items()]
    return [
        found
        for title, inside in pairs
        for found in (walk_nav(inside) if isinstance(inside, list) else [(title, inside)])
    ]


def readme_page(page: str) -> str:
    """The README's sections of a page; the first one's heading becomes the page's."""
    found = sections((ROOT / "README.md").read_text(encoding="utf-8"))
    text = "".join(found[name] for name in README_PAGES[page])
    return rewrite_links(text.removeprefix("#") if text.startswith("## ") else text)


def recipe(path: Path) -> str:
    """A config's header as a section: its first lines as a sentence, the others as they are."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line[1:].removeprefix(" ") for line in lines if line.startswith("#")][1:]
    end = header.index("")
    facts = "\n".join("    " + line for line in header[end + 1 :])
    return f"## {path.stem}\n\n{' '.join(header[:end])}\n\n{facts}\n"


def recipes_page() -> str:
    """All configs, by their headers."""
    begin = (
        "# Recipes\n\nThe headers of the files in `configs/`. `mhe train NAME` takes each by its "
        "name, `mhe config NAME` shows every setting with its meaning.\n"
    )
    return "\n".join([begin, *map(recipe, sorted((ROOT / "configs").glob("*.yaml")))])


def settings_page() -> str:
    """Every key of a config, by `configs/schema.json`: what it holds, its default, its meaning."""
    schema = json.loads((ROOT / "configs" / "schema.json").read_text(encoding="utf-8"))
    begin = (
        "# Settings\n\nEvery key of a run's YAML file. `mhe config NAME` prints the same with the "
        "values of a config; a key that does not exist, or does not apply, is refused by name.\n"
    )
    return "\n".join([begin, *_settings(schema, schema["properties"], "")])


def _settings(schema: Any, properties: Any, prefix: str) -> Iterator[str]:
    """The sections of a level, each with a table of its keys and then those below it."""
    for name, key in properties.items():
        section = _definition(schema, key)
        if section is None:
            continue
        path = f"{prefix}{name}"
        about = section.get("description") or key.get("description", "")
        if "items" in key:
            about += " A list of such sections."
        yield f"{'##' if not prefix else '###'} {path}\n\n{about}\n"
        keys = {n: k for n, k in section["properties"].items() if _definition(schema, k) is None}
        if keys:
            rows = [_row(f"{path}.{n}", key) for n, key in keys.items()]
            yield "\n".join(["| key | holds | default | |", "|---|---|---|---|", *rows, ""])
        yield from _settings(schema, section["properties"], f"{path}.")


def _definition(schema: Any, key: Any) -> Any:
    """The section that a key holds, or a list of it, or null; None if it holds a value."""
    options = [key, *key.get("anyOf", []), key.get("items", {})]
    name = next((o["$ref"].rpartition("/")[2] for o in options if "$ref" in o), None)
    found = schema["$defs"].get(name)
    return found if found and "properties" in found else None


def _row(path: str, key: Any) -> str:
    default = f"`{json.dumps(key['default'])}`" if "default" in key else "(required)"
    about = key.get("description", "")
    return "| " + " | ".join(
        cell.replace("|", "\\|") for cell in (f"`{path}`", _holds(key), default, about)
    ) + " |"  # fmt: skip


def _holds(key: Any) -> str:
    """What a key may hold, in a few words."""
    if "anyOf" in key:
        return " or ".join(dict.fromkeys(_holds(option) for option in key["anyOf"]))
    if "enum" in key or "const" in key:
        return ", ".join(f"`{value}`" for value in key.get("enum") or [key["const"]])
    if "$ref" in key:
        return "a section"
    names = {"array": "list", "object": "mapping", "null": "null", "boolean": "true or false"}
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    said = [f"{sign} {key[bound]}" for bound, sign in bounds.items() if bound in key]
    kind = key.get("type", "anything")
    return " ".join([names.get(kind, kind), ", ".join(said)]).strip()


def pages() -> dict[str, str]:
    """Every page that no file of docs/ holds, by its name on the site."""
    if str(ROOT) not in sys.path:  # MkDocs runs elsewhere than the tests
        sys.path.append(str(ROOT))
    from tools.site_verbs import verbs_page

    whole = {
        page: rewrite_links((ROOT / source).read_text(encoding="utf-8"))
        for page, source in WHOLE_PAGES.items()
    }
    return {
        **{page: readme_page(page) for page in README_PAGES},
        **whole,
        "recipes.md": recipes_page(),
        "settings.md": settings_page(),
        "verbs.md": verbs_page(),
    }


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to those of docs/."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def loaded_from_elsewhere(page: str) -> list[str]:
    """What a browser fetches from the network to show an HTML page; not links to follow."""
    tags = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", page)
    return [tag for tag in tags if re.search(r'(?:src|href)="(?:https?:)?//', tag)]


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Warn, which ends a strict build, if a page of the site needs the network."""
    from mkdocs.plugins import get_plugin_logger

    for tag in loaded_from_elsewhere(output):
        get_plugin_logger("site").warning("%s needs the network: %s", page.file.src_uri, tag)
    return output
