"""Methods: one file each, with its opponent, its pairs, its loss and what it requires of the configuration.

A method is imported when a configuration names it. One of this package stands in the file of its name, and in
`config.method.MethodName`; one from outside registers itself with :func:`online_dpo.methods.base.method`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from online_dpo.config.method import MethodName
from online_dpo.config.registry import Registry

if TYPE_CHECKING:
    from online_dpo.methods.base import Method

METHODS: Registry[Method] = Registry("method", {name: f"{__name__}.{name}" for name in get_args(MethodName)})
