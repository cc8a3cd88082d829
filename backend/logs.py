"""Logging: one line per record, as text or JSON, with the id of the request that it belongs to."""

from __future__ import annotations

import json
import logging
import re
import secrets
from contextvars import ContextVar
from datetime import datetime, timezone

from backend.settings import Settings

REQUEST_ID: ContextVar[str] = ContextVar("request", default="-")
TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s [%(request)s]: %(message)s"
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def choose_request_id(given: str | None) -> str:
    """Returns the caller's request id if it is safe to log, else a new one."""
    return given if given and VALID_REQUEST_ID.fullmatch(given) else secrets.token_hex(4)


class _RequestIdFilter(logging.Filter):
    """Adds the current request id to each record; drops none."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request = REQUEST_ID.get()
        return True


class TextFormatter(logging.Formatter):
    """One line per record; control characters in a message are escaped, since URLs and task ids are foreign text."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Formats the line with control characters escaped as Python writes them."""
        record.message = CONTROL_CHARACTERS.sub(lambda match: repr(match[0])[1:-1], record.message)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, request, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats the record as one line of JSON."""
        fields = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "request": getattr(record, "request", "-"),
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def set_up_logging(settings: Settings) -> None:
    """Logs to standard error, in the format and from the level that the settings name.

    Records of urllib3 below WARNING are dropped: they would show image URLs with their signatures.
    """
    stream = logging.StreamHandler()
    stream.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter(TEXT_FORMAT))
    stream.addFilter(_RequestIdFilter())
    logging.basicConfig(level=settings.log_level, handlers=[stream])
    logging.getLogger("urllib3").setLevel(logging.WARNING)
