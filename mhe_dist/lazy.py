"""Names of a package that are imported when they are used, so that the package imports quickly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package: its name.
        modules: the module that each name stands in; a name that is a module of the package
            stands for itself.
    """

    def attribute(name: str) -> Any:
        """What stands under the name, its module imported now."""
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(modules[name])
        return module if modules[name] == f"{package}.{name}" else getattr(module, name)

    def names() -> list[str]:
        """What `dir()` lists: names that were used and names that may be."""
        return sorted({*vars(import_module(package)), *modules})

    return attribute, names
