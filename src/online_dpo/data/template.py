"""Prompt templates: a text with names of columns in braces, in the format of ``str.format``.

Only what makes a prompt of a row's values is allowed. ``str.format`` itself would read attributes of Python objects,
print ``None`` and ``nan``, and pad a value to a length that fills the memory.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from online_dpo.data.text import UnusablePrompt
from online_dpo.errors import named_error

MAX_WIDTH_DIGITS = 3
"""Digits of a width or precision: ``{a:>999}`` is the widest."""

_FORMATTER = string.Formatter()


def template_columns(template: str) -> list[str]:
    """List the columns that a template uses, in order: ``"{a}: {b[0]}"`` uses ``["a", "b"]``.

    Raises:
        ValueError: the braces do not match, a field has no name or is more than a column or an entry of one, or there
            is no field at all.
    """
    names = []
    for field, spec, conversion in _fields(template):
        name = re.split(r"[.\[]", field)[0]
        if not name or name.isdigit():
            raise ValueError(f"`prompt_template` {template!r} must name columns in braces, such as '{{question}}'.")
        if "." in re.sub(r"\[[^\]]*\]", "", field):
            raise ValueError(
                f"`prompt_template` {template!r}: '{{{field}}}' reads an attribute. Name a column, such as "
                f"'{{{name}}}', or an entry of one, such as '{{{name}[key]}}'."
            )
        if "{" in spec or re.search(rf"\d{{{MAX_WIDTH_DIGITS + 1}}}", spec):
            raise ValueError(
                f"`prompt_template` {template!r}: the format ':{spec}' may hold no other field, and no width above "
                f"{10**MAX_WIDTH_DIGITS - 1}."
            )
        if conversion not in (None, "r", "s", "a"):
            raise ValueError(
                f"`prompt_template` {template!r}: there is no conversion '!{conversion}', only !r, !s, !a."
            )
        names.append(name)
    if not names:
        raise ValueError(f"`prompt_template` {template!r} must name columns in braces, such as '{{question}}'.")
    return list(dict.fromkeys(names))


def _fields(template: str) -> list[tuple[str, str, str | None]]:
    """The fields in braces, each with its format and conversion."""
    try:
        parts = list(_FORMATTER.parse(template))
    except ValueError as error:
        raise ValueError(
            f"`prompt_template` {template!r} is malformed ({error}). To write a brace as text, double it."
        ) from None
    return [(field, spec or "", conversion) for _, field, spec, conversion in parts if field is not None]


def fill_template(template: str, row: Mapping[str, Any]) -> str:
    """Fill a checked template with the columns of a row.

    Raises:
        UnusablePrompt: a value is missing, or is not text.
    """
    for name in template_columns(template):
        if row.get(name) is None:
            raise UnusablePrompt(f"column `{name}` of the template is missing (null)")
    try:
        return _PromptFormatter().vformat(template, (), row)
    except (LookupError, AttributeError, ValueError, TypeError) as error:
        raise UnusablePrompt(f"the template cannot be filled ({named_error(error)})") from None


class _PromptFormatter(string.Formatter):
    """Fills a template with values that read as text."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The value of a field and the name of its column."""
        value, name = super().get_field(field_name, args, kwargs)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise UnusablePrompt(f"`{field_name}` of the template is missing ({'null' if value is None else 'NaN'})")
        if isinstance(value, bytes):
            raise UnusablePrompt(f"`{field_name}` of the template is of type bytes, not text")
        return value, name
