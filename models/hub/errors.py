"""The errors of everything that looks for a model's files."""

from __future__ import annotations


class SourceError(Exception):
    """Files that can't be had: one line that names the entry or repository, what is wrong and what to do."""


class HubUnavailable(SourceError):
    """The Hub can't be reached or answers that it can't answer now: trying again may help."""
