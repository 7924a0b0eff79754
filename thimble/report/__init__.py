"""A run as one page: ``report.html``, readable without network, and its plots as PNG."""

from __future__ import annotations

from thimble.report.page import Report, report

__all__ = ["Report", "report"]
