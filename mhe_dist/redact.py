"""Keeps secrets out of logs, parameters and messages. Pure, apart from reading the environment."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
_SECRET_WORDS = (
    *("password", "passwd", "passphrase", "pwd"),
    *("secret", "token", "credential", "credentials"),
)
_SECRET_PAIRS = ("api_key", "apikey", "access_key", "private_key", "secret_key", "account_key")
_SECRET_LAST = ("key", "pass")  # SIGNING_KEY, DB_PASS; but not after these:
_OPEN = ("public", "primary", "foreign", "sort", "partition", "cache", "neighbour", "first")
# A password may hold `@`, and, in the URL of a database, `/`, `?` and `#`; a port may not.
_URL_USER = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)"
    r"(?:[^/\s?#'\"]+|[^/\s?#@:'\"\[\]]*:(?!\d*[/?#])[^\s'\"]+)@"
)
_URL_QUERY = re.compile(
    r"(?P<name>[?&;](?:[\w.-]*(?:token|secret|password|passwd|signature|credential|key)|sig|pwd)=)"
    r"[^&;\s'\"]+",
    re.IGNORECASE,
)
_SHORTEST_SECRET = 6
_WORKING_FOLDERS = ("PWD", "OLDPWD")  # set by every shell; elsewhere `pwd` means a password


def is_secret_name(name: str) -> bool:
    """Whether a key of that name holds a secret: `db_password`, `HF_TOKEN`, `signingKey`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()
    if any(pair in words for pair in _SECRET_PAIRS):
        return True
    *_, before, last = ["", *words.rpartition(".")[2].split("_")]
    if last in _SECRET_LAST and before not in _OPEN and (before or last == "pass"):
        return True
    return any(word in _SECRET_WORDS for word in re.split(r"[_.]", words))


def scrub(text: str) -> str:
    """The text without credentials of URLs and without values of secret environment variables."""
    for value in environment_secrets():
        text = text.replace(value, MASK)
    return scrub_urls(text)


def scrub_urls(text: str) -> str:
    """The text without credentials of URLs: the same in every process, whatever its environment."""
    text = _URL_USER.sub(rf"\g<scheme>{MASK}@", text)
    return _URL_QUERY.sub(rf"\g<name>{MASK}", text)


def environment_secrets() -> list[str]:
    """Values of the environment variables whose names say that they are secret, longest first."""
    values = {
        value
        for name, value in os.environ.items()
        if is_secret_name(name) and name not in _WORKING_FOLDERS
    }
    return sorted((v for v in values if len(v) >= _SHORTEST_SECRET), key=len, reverse=True)


def masked(value: Any, name: str = "") -> Any:
    """A copy of nested mappings and sequences with every secret replaced by `***`.

    Args:
        value: the mapping, sequence or scalar.
        name: the key that holds it. Under a secret name texts and numbers are masked; a flag
            (`class_token: true`) and an empty text hide nothing and stay.
    """
    if isinstance(value, Mapping):
        return {key: masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, name) for item in value]
    if is_secret_name(name) and value not in (None, "") and not isinstance(value, bool):
        return MASK
    return scrub(value) if isinstance(value, str) else value


class ScrubbingFormatter(logging.Formatter):
    """Lines of a log, tracebacks too, as `scrub` leaves them."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return scrub(super().format(record))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys: `{"a": {"b": 1}}` is `{"a.b": 1}`."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{path}.")
        else:
            out[path] = value
    return out
