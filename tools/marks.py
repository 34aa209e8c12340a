"""Marks: comments in a page between which a tool writes."""

from __future__ import annotations


def marks(name: str) -> tuple[str, str]:
    """The comments around what is called so."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def between(marks: tuple[str, str], page: str, text: str) -> str:
    """A page with a text between its marks."""
    head, rest = page.split(marks[0])
    return f"{head}{marks[0]}\n{text}{marks[1]}{rest.split(marks[1])[1]}"
