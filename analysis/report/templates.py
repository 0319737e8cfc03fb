"""Templates of pages: where they lie, and how numbers and commands are written in them."""

from __future__ import annotations

import re
from functools import partial
from importlib.resources import files

import jinja2
from markupsafe import Markup, escape


def asset(package: str, name: str) -> str:
    """A template, style or script that lies in a package."""
    return files(package).joinpath(name).read_text(encoding="utf-8")


def environment(package: str) -> jinja2.Environment:
    """The templates of a package; what they insert is escaped, what they lack is an error."""
    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(partial(asset, package)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "code": code}
    return made


def number(value: float | None, digits: int = 3) -> str:
    """A number with a true minus sign; an en dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def code(sentence: str) -> Markup:
    """A sentence whose parts between backticks are code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(sentence))))
