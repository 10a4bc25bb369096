"""What a run reports while it goes on: plain dicts, sent from workers to the terminal."""

from __future__ import annotations

from typing import Any

Event = dict[str, Any]
