"""Plans for the judges that a run file can name without code: ``llm``, ``human``, and a pairwise model's folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.cli.runfile.schema import FieldSpec, read_fields_of
from online_dpo.cli.runfile.values import BadValue, convert
from online_dpo.config.feedback import HUMAN
from online_dpo.config.llm_judge import TEMPLATES, JudgeSettings
from online_dpo.config.model_folder import WrongFolder, folder_problem, read_object
from online_dpo.config.pairwise_judge import OPTIONS, check_options, pairwise_kind
from online_dpo.config.registry import nearest

FILES = ("rubric_file", "template")
PAIRWISE_OPTIONS = {
    name: FieldSpec(name, annotation, None, "", group="")
    for options in OPTIONS.values()
    for name, annotation in options.items()
}


@dataclass(frozen=True)
class BuiltInJudge:
    """A judge of this package.

    >>> BuiltInJudge(folder=None, options={"model": "gpt-4.1-mini"})

    ``folder`` is that of a pairwise model; if it is ``None``, the judge is a language model behind an endpoint, or,
    if ``human``, people who vote in the dashboard.
    """

    folder: Path | None
    options: dict[str, Any]
    human: bool = False


def plan_built_in(name: str, model: Path | None, given: dict[str, Any], folders: Sequence[Path]) -> BuiltInJudge:
    """Check the settings of a judge: of the pairwise model in the folder ``model``, else of ``llm`` or ``human``.

    Raises:
        ValueError: see `plan_pairwise_model`, `plan_human`, `plan_llm`.
    """
    if model is not None:
        return plan_pairwise_model(model, given)
    return plan_human(given) if name == HUMAN else plan_llm(given, folders)


def plan_llm(given: dict[str, Any], folders: Sequence[Path]) -> BuiltInJudge:
    """Check the settings of a language model as judge. Relative paths are searched in ``folders``, in order.

    Raises:
        ValueError: a setting is unknown, of the wrong type, or out of range; or there is no API key.
    """
    options = _converted(given, read_fields_of("online_dpo.config.llm_judge", "JudgeSettings"))
    for name in FILES:
        if options.get(name) is not None and options[name] not in TEMPLATES:
            given_path = Path(os.path.expanduser(options[name]))
            existing = (path for folder in folders if (path := folder / given_path).is_file())
            options[name] = str(next(existing, options[name]))
    if "model" not in options:
        raise ValueError("`judge_kwargs` needs at least `model`, the judging model's name at the endpoint.")
    JudgeSettings(**options).check_environment()
    return BuiltInJudge(None, options)


def plan_human(given: dict[str, Any]) -> BuiltInJudge:
    """Check that people as judge have been given no settings.

    Raises:
        ValueError: there are some.
    """
    if given:
        raise ValueError("people take no `judge_kwargs`; `human_timeout` says how long a step waits for their votes.")
    return BuiltInJudge(None, {}, human=True)


def plan_pairwise_model(folder: Path, given: dict[str, Any]) -> BuiltInJudge:
    """Check the folder and the options of a pairwise model as judge, without loading it.

    Raises:
        ValueError: the folder holds no model, or an option is unknown, of the wrong type or not for this model.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model folder: it holds no config.json.")
    options = _converted(given, PAIRWISE_OPTIONS)
    try:
        config = read_object(folder / "config.json")
        check_options(pairwise_kind(config), options)
    except WrongFolder as problem:
        raise ValueError(f"{folder}: {problem}") from None
    if problem := folder_problem(str(folder), "judge"):
        raise ValueError(problem)
    return BuiltInJudge(folder, options)


def _converted(given: dict[str, Any], specs: dict[str, FieldSpec]) -> dict[str, Any]:
    options = {}
    for name, value in given.items():
        if name not in specs:
            raise ValueError(f"`{name}` is not one of `judge_kwargs`.{nearest(name.replace('-', '_'), specs)}")
        try:
            options[name] = convert(specs[name], value)
        except BadValue as problem:
            raise ValueError(f"`{name}` {problem}") from None
    return options
