"""Logs: one line a record, as text or JSON, with the id of the request that it is about."""

from __future__ import annotations

import json
import logging
import re
import secrets
from contextvars import ContextVar
from datetime import datetime, timezone

from backend.settings import Settings

REQUEST_ID: ContextVar[str] = ContextVar("request", default="-")
TEXT = "%(asctime)s %(levelname)s %(name)s [%(request)s]: %(message)s"
CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def choose_request_id(given: str | None) -> str:
    """The caller's id of its request, where it is one that fits into a line, else a new one."""
    return given if given and ID.fullmatch(given) else secrets.token_hex(4)


class _WithRequest(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request = REQUEST_ID.get()
        return True


class TextFormatter(logging.Formatter):
    """One line a record, whatever a message holds: addresses and numbers of tasks are others' texts."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, with control characters as Python writes them."""
        record.message = CONTROL.sub(lambda found: repr(found[0])[1:-1], record.message)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, request, message, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as such a line."""
        row = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "request": getattr(record, "request", "-"),
            "message": record.getMessage(),
        }
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row, ensure_ascii=False)


def set_up_logging(settings: Settings) -> None:
    """To standard error; urllib3's own records would show addresses of pictures with the signatures in them."""
    stream = logging.StreamHandler()
    stream.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter(TEXT))
    stream.addFilter(_WithRequest())
    logging.basicConfig(level=settings.log_level, handlers=[stream])
    logging.getLogger("urllib3").setLevel(logging.WARNING)
