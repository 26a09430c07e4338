"""Passwords and tokens of URIs, out of errors and log lines."""

import logging
import re
import traceback
from collections.abc import Mapping
from typing import Any

__all__ = ["mask_logs", "masked", "redact"]


# After ://user: up to the last @, beyond a slash too unless a port stands before it.
_IN_URI = re.compile(r"://([^\s/:@?'\"]*)(:(?:(?!\d*/)[^\s'\"]*|[^\s/]*))?@")
_LONGEST_NAME = 15  # of a user; what is longer is a token
_KEY = r"((?:password|passwd|pwd|token|secret|(?:api|access)_?key)"
_NAMED = re.compile(
    _KEY + r"(?:\s*=\s*|['\"]\s*:\s*))('[^']*'|\"[^\"]*\"|[^&\s'\"]+)", re.IGNORECASE
)


def redact(text: str) -> str:
    """Mask the passwords and tokens of URIs and settings in a text."""
    return _NAMED.sub(r"\1***", _IN_URI.sub(_without_secret, text))


def _without_secret(found: re.Match[str]) -> str:
    """Keep of a URI's user and password a short name that has a password."""
    user, password = found.groups()
    if not password:
        return "://***@"
    return f"://{user if len(user) <= _LONGEST_NAME else '***'}:***@"


def masked(value: Any) -> Any:
    """Copy of mappings and lists with the texts in them masked."""
    if isinstance(value, Mapping):
        return {key: masked(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def mask_logs() -> None:
    """Mask them in all that this process logs from now on, tracebacks included."""
    before = logging.getLogRecordFactory()
    if isinstance(before, _Masking):
        return
    logging.setLogRecordFactory(_Masking(before))


class _Masking:
    def __init__(self, make: Any) -> None:
        self.make = make

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self.make(*args, **kwargs)
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):
            return record  # logging itself reports a message that can't be formatted
        if (masked := redact(text)) != text:
            record.msg, record.args = masked, None
        if record.exc_info and record.exc_info[0] is not None:
            lines = traceback.format_exception(*record.exc_info)
            record.exc_text = redact("".join(lines).rstrip())
        return record
