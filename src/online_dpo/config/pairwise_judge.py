"""The kinds of pairwise models, told apart by their configs, and the options that each takes. No heavy imports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CLASSIFIER, PAIRRM, LETTERS = "sequence classifier", "PairRM", "causal language model"

OPTIONS = {
    CLASSIFIER: {"template": "str", "batch_size": "int"},
    PAIRRM: {"max_tokens": "int", "batch_size": "int"},
    LETTERS: {"template": "str", "letters": "list[str]", "batch_size": "int"},
}
"""Names of options and their types."""

PAIRRM_FIELDS = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "n_tasks", "drop_out")
PLACES = ("{prompt}", "{first}", "{second}")


def pairwise_kind(config: Mapping[str, Any]) -> str:
    """The kind of a model, from its config.json.

    Raises:
        ValueError: it is PairRM, but not in the form of transformers, or without the tokens it reads at.
    """
    if "ranker_type" in config:
        raise ValueError(
            "this is PairRM in LLM-Blender's own form. Give the same model in the form of transformers, "
            "such as llm-blender/PairRM-hf."
        )
    kind = kind_of_class(next(iter(config.get("architectures") or [""])))
    if kind == PAIRRM and (missing := [field for field in PAIRRM_FIELDS if field not in config]):
        raise ValueError(f"PairRM's config.json must say {', '.join(f'`{field}`' for field in missing)}.")
    return kind


def kind_of_class(name: str) -> str:
    """The kind of a model, from the name of its class."""
    if name == "DebertaV2PairRM":
        return PAIRRM
    return LETTERS if name.endswith(("ForCausalLM", "LMHeadModel")) else CLASSIFIER


def check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Check the options of a kind of pairwise model.

    Raises:
        ValueError: this kind of model does not take an option, or not that value.
    """
    for name, value in options.items():
        if name not in OPTIONS[kind]:
            taken = ", ".join(f"`{option}`" for option in OPTIONS[kind])
            raise ValueError(f"A {kind} as judge takes no `{name}`; it takes {taken}.")
        if OPTIONS[kind][name] == "int" and value < 1:
            raise ValueError(f"`{name}` must be 1 or more; it is {value}.")
    template, letters = options.get("template"), options.get("letters")
    if template is not None and (missing := [place for place in PLACES if place not in template]):
        raise ValueError(f"The template has no place for {', '.join(missing)}.")
    if letters is not None and not (len(letters) == 2 and all(letters) and letters[0] != letters[1]):
        raise ValueError(f"`letters` must be two different answers, for the first and the second; it is {letters}.")
