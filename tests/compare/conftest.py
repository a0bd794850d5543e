"""Fixtures of the browser."""

from browser import chromium, visit

__all__ = ["chromium", "visit"]
