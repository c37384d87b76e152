"""The names that users write, as the package has them now.

``PYTHONPATH=tests python -m support.public_names > tests/public_names.json`` takes what is new into the list.
"""

from __future__ import annotations

import inspect
import json
from importlib import import_module

from online_dpo.cli.main import COMMANDS
from online_dpo.cli.runfile.help import GROUPS
from online_dpo.cli.runfile.schema import load_fields
from online_dpo.config.registry import registries

MODULES = ("online_dpo", "online_dpo.config", "online_dpo.doctor", "online_dpo.scoring")
"""Those that say in ``__all__`` what is public."""
DEFINING = ("online_dpo.errors", "online_dpo.types")
"""Those whose public classes all are."""
DECORATORS = {
    "check": "online_dpo.doctor.registry",
    "engine": "online_dpo.rollout.registry",
    "judge": "online_dpo.scoring.judge_registry",
    "loss": "online_dpo.objective.losses",
    "method": "online_dpo.methods.base",
    "metric": "online_dpo.training.metric_registry",
    "reward": "online_dpo.scoring.registry",
    "strategy": "online_dpo.pairing.strategies",
}
"""With which plugins register what is theirs."""


def public_names() -> dict[str, list[str]]:
    """Names of every kind, sorted. To be called in a fresh process: elsewhere, plugins of tests are among them."""
    names = {f"from {name} import": list(import_module(name).__all__) for name in MODULES}
    names |= {f"from {name} import": _public(name) for name in DEFINING}
    decorators = [
        f"{module}.{name}" for name, module in DECORATORS.items() if callable(getattr(import_module(module), name))
    ]
    import_module("online_dpo.doctor.examine")  # registers the checks
    names |= {"decorators of plugins": decorators}
    names |= {f"registered under `{registry.kind}`": list(registry) for registry in registries()}
    names["fields of a run"] = [name for name, field in load_fields().items() if field.section in GROUPS]
    names["commands"] = list(COMMANDS)
    return {kind: sorted(listed) for kind, listed in names.items()}


def _public(module: str) -> list[str]:
    """Names without an underscore of what a module defines itself."""
    defined = inspect.getmembers(import_module(module), inspect.isclass)
    return [name for name, thing in defined if thing.__module__ == module and not name.startswith("_")]


if __name__ == "__main__":
    print(json.dumps(public_names(), indent=2))
