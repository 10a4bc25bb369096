"""Whether a text is the address of a server, seen before anything is asked there."""

from __future__ import annotations

from urllib.parse import urlsplit


def is_web_address(url: str) -> bool:
    """Whether it begins with `http(s)://` and a host, and its port is none or one that can be."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # no number, or a larger one; a bracket without its other
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
