"""Reads YAML that comes from outside: run files, and values on the command line. Nothing heavy may be imported here.

PyYAML reads YAML 1.1, in which ``1:30`` is 90, ``010`` is 8, ``1e-5`` is text and ``2024-01-31`` is a date. Here the
first two and the date are text (``010`` is ten where a number is wanted), and ``1e-5`` is a number. Aliases may not
multiply without end.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

MAX_DEPTH = 50
"""Levels of lists and mappings inside each other."""
MAX_NODES = 20_000
"""Values of a text, each counted as often as aliases repeat it."""

_PREFIX = "tag:yaml.org,2002:"
_PLAIN = {
    "int": (r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)", "-+0123456789"),
    "float": (
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
"""Numbers: how they are written, and the letters with which they begin."""
_KEPT = ("bool", "null", "merge")
"""Kinds of plain values that are read as PyYAML reads them."""
_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")
"""Tags that a value may have. Others make objects that no field takes."""


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2, and limits."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose the next node, unless it is nested too deeply."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {MAX_DEPTH} levels deep", problem_mark=self.peek_event().start_mark
            )
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def get_single_node(self) -> yaml.Node | None:
        """Compose the only document, and check how far its aliases expand."""
        node = super().get_single_node()
        if node is not None:
            _check_size(node)
        return node

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        """The value of a number or truth value, which may have a tag that it does not fit."""
        kind = node.tag.removeprefix(_PREFIX)
        try:
            value = getattr(self, f"construct_yaml_{kind}")(node)
        except (ValueError, KeyError):
            raise _problem(f"{_shortened(node.value)} is no {kind}", node) from None
        if isinstance(value, float) and math.isinf(value) and "inf" not in node.value.lower():
            raise _problem(f"{_shortened(node.value)} is beyond the range of a float; text is written in quotes", node)
        return value


def parse_yaml(text: str) -> Any:
    """Read a YAML text.

    >>> parse_yaml("[1e-5, 1:30, 2024-01-31, no]")
    [1e-05, '1:30', '2024-01-31', False]

    Raises:
        yaml.YAMLError: the text is no YAML, or is beyond a limit.
    """
    loader = StrictLoader(text)
    node = loader.get_single_node()
    return None if node is None else loader.construct_document(node)


def _check_size(root: yaml.Node) -> None:
    """Check that aliases neither repeat too much nor refer to what holds them."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 0  # being counted
            children = [*_children(node)]
            sizes[id(node)] = 1 + sum(map(size, children))
        elif sizes[id(node)] == 0:
            raise _problem("an alias refers to what it stands in", node)
        if sizes[id(node)] > MAX_NODES:
            raise _problem(f"more than {MAX_NODES} values, counted as often as aliases repeat them", node)
        return sizes[id(node)]

    size(root)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _problem(text: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """The kinds of plain values by their first letter."""
    kept: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items():
        kept[letter] = [rule for rule in rules if rule[0].removeprefix(_PREFIX) in _KEPT]
    for kind, (pattern, letters) in _PLAIN.items():
        for letter in letters:
            kept.setdefault(letter, []).append((_PREFIX + kind, re.compile(rf"(?:{pattern})\Z")))
    return kept


StrictLoader.yaml_implicit_resolvers = _resolvers()
StrictLoader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix(_PREFIX) in _TAGS
}
for _kind in ("int", "float", "bool"):
    StrictLoader.add_constructor(_PREFIX + _kind, StrictLoader.construct_number)
