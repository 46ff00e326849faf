"""What a chat template's source says before it is rendered: its date, and what it looks for."""

from __future__ import annotations

import datetime
import re

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from exporters.errors import ExportError

DATE = datetime.datetime(2024, 7, 26)  # Llama 3.2's own, where it is not told the day
_CODES = ("-d", "-m", "-H", "-I", "-M", "-S", "-y", "-j", *"aAwdbBmyYHIMpSfjUWcxXFDRTeGuV")
_ASKED = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1""")


def on_that_day(template: str, origin: str) -> str:
    """The template with its clock stopped: a macro that writes ``DATE``. Raises ``ExportError`` for
    a format that it cannot write."""
    asked = {code for _, form in _ASKED.findall(template) for code in re.findall("%-?.", form)}
    if strange := asked - {f"%{code}" for code in _CODES}:
        raise ExportError(
            f"{origin} asks for the date as {', '.join(sorted(strange))}, which is not known: give "
            f"one with --chat-template FILE that has the day written out."
        )
    told = "format"
    for code in _CODES:
        told += f" | replace('%{code}', '{DATE.strftime('%' + code)}')"
    # The line break is the block's, and vanishes with it.
    return f"{{% macro strftime_now(format) %}}{{{{ {told} }}}}{{% endmacro %}}\n{template}"


def constants(template: str) -> tuple[str, ...]:
    """The texts that stand in a template's expressions, which it may look for in what is said."""
    try:
        parsed = Environment(extensions=[_Generation]).parse(template)
        found = {_value(one) for one in parsed.find_all(nodes.Expr)}
    except (TemplateError, RecursionError):
        return ()  # rendering it says so
    return tuple(sorted(one for one in found if one))


def _value(expression: nodes.Expr) -> str:
    """The text that an expression of constants alone is, as ``'</' ~ 'think>'``; empty for any
    other."""
    try:
        value = expression.as_const()
    except nodes.Impossible:
        return ""
    return value if isinstance(value, str) else ""


class _Generation(Extension):
    """The block that marks what the assistant says: here its content."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
