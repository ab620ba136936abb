"""Keeps keys and tokens out of the log: at level debug the web server writes down URLs, headers and frames."""

from __future__ import annotations

import logging
import re

LOGGERS = ("uvicorn.error", "uvicorn.access")
_CREDENTIAL = re.compile(r"""(fs_[0-9a-f]{12}_|fewstep\.auth\.|\b(?:token|key|api_key)["']?\s*[:=]\s*["']?)[\w.~%-]+""")


def redact(text: str) -> str:
    """What a credential begins with stays, so that one can see whose it was."""
    return _CREDENTIAL.sub(r"\1…", text)


class Redaction(logging.Filter):
    """Rewrites records; lets all of them through."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        return True


def redact_logs() -> None:
    """For the loggers of the web server, once however often it is called."""
    for logger in map(logging.getLogger, LOGGERS):
        if not any(isinstance(known, Redaction) for known in logger.filters):
            logger.addFilter(Redaction())
