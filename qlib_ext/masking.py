"""Passwords and tokens of URIs, out of errors and log lines."""

import logging
import re
import traceback
from typing import Any

__all__ = ["mask_logs", "redact"]


def redact(text: str) -> str:
    """Mask the passwords and tokens of URIs in a text."""
    text = re.sub(r"(://[^\s/:@]*:)[^\s/]+@", r"\1***@", text)
    return re.sub(r"(?i)\b(password|passwd|pwd|token)=[^&\s'\"]+", r"\1=***", text)


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
