"""Methods: one file each, with its opponent, its pairs, its loss and what it requires of the configuration.

A method is imported when a configuration names it. One in this package is a line below; one from outside registers
itself with :func:`online_dpo.methods.base.method`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from online_dpo.config.registry import Registry

if TYPE_CHECKING:
    from online_dpo.methods.base import Method

METHODS: Registry[Method] = Registry(
    "method",
    {
        "online_dpo": "online_dpo.methods.online_dpo",
        "xpo": "online_dpo.methods.xpo",
        "nash_md": "online_dpo.methods.nash_md",
    },
)
