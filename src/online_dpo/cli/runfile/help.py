"""The texts of ``train --help`` and ``eval --help``: names of fields by group, or fields with type, default and
documentation."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from online_dpo.cli.evaluation.options import RUN_FIELDS
from online_dpo.cli.runfile.entries import COMMAND_LINE, UsageError
from online_dpo.cli.runfile.planning import HELP_ALL
from online_dpo.cli.runfile.ray_section import NAME as RAY_SETTINGS
from online_dpo.cli.runfile.schema import PARENT, FieldSpec, load_fields, read_fields_of
from online_dpo.config.names_elsewhere import hint_for

USAGE = """\
usage: online-dpo train [run.yaml] [--field value ...] [--traceback]

Train a model. The YAML file has the fields, one `name: value` a line; fields on the command line win.

  --config FILE  another way to give the run file
  --traceback    show where in the code an error came from
  --help         show this text; `--help beta` (a field), `--help pairs` (a group) or `--help judge` (any word)
  --help-all     every field with its type, default and meaning

Exit code: 0 the model is trained and saved; 1 the run failed; 2 wrong input; 3 nothing was trained; 128 + n signal n.
"""

RAY_USAGE = """\
usage: online-dpo ray [run.yaml] [--field value ...] [--ray.setting value ...] [--traceback]

Train on a Ray cluster: the processes that train, and the vLLM servers that they sample from, as the section `ray` of
the run file says. All other fields are those of `online-dpo train`. Processes that are lost are started again.

  online-dpo ray run.yaml --ray.train_gpus 8 --ray.servers 2

  --config FILE  another way to give the run file
  --traceback    show where in the code an error came from
  --help         show this text; `--help servers` (a setting, or any word) shows only what matches

Exit code: that of `online-dpo train`; 2 as well if the cluster has no room for the run in time.
"""

EVAL_USAGE = """\
usage: online-dpo eval [run.yaml] [--model MODEL] [--against MODEL] [--option value ...]

Compare two models on held-out prompts: which model's answers are better, by how much, and how far apart the models are.
Both answer the same prompts with the same random numbers. The run file gives the prompts, the sampling settings and the
scorer; options on the command line win.

  online-dpo eval run.yaml                                          the trained model against the one before training
  online-dpo eval run.yaml --model outputs/checkpoint-100 --judge llm --judge_kwargs '{model: gpt-4.1-mini}'
  online-dpo eval --model A --against B --prompts prompts.jsonl --reward path/to/reward_model

Without --reward or --judge, the run's gold scorer is used (eval_reward_funcs, eval_reward_model_path, eval_judge). If
there is none, the scorer that the run was trained on is used, with a warning.

  --config FILE  another way to give the run file
  --traceback    show where in the code an error came from
  --help         show this text; `--help samples` (an option, or any word) shows only what matches
"""


GROUPS = {
    "models": "the policy and its reference, and how they are loaded",
    "adapters": "LoRA, and QLoRA with `load_in_4bit`",
    "data": "prompts to train and to evaluate on",
    "sampling": "how completions are sampled",
    "vllm": "sampling with vLLM",
    "scoring": "rewards and judges, which score completions",
    "pairs": "which completions become chosen and rejected",
    "gold": "a second scorer for evaluation, which training never uses",
    "loss": "what is minimised",
    "method": "Online DPO, XPO or Nash-MD; an adapting beta",
    "training": "batches, memory and speed",
    "plugins": "Python files that add losses, strategies, methods, engines, rewards, judges and metrics",
    "guards": "conditions that stop a run",
    "checkpoints": "what is refused, or not, where a folder holds checkpoints",
    "record": "what a run writes down of itself",
    "ray": "processes on a Ray cluster",
}
"""Groups of fields and their headings, in the order of the help text."""

USUAL = (
    *("output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("lr_scheduler_type", "warmup_steps", "max_grad_norm", "seed", "use_cpu", "eval_strategy", "eval_steps"),
    *("save_strategy", "save_steps", "save_total_limit", "report_to", "run_name", "resume_from_checkpoint"),
)
"""Fields of `transformers.TrainingArguments` that most runs set."""


def train_help(topic: Sequence[str] = ()) -> str:
    """The help of ``train``: an overview, the fields that match a topic, or with `HELP_ALL` all fields.

    Raises:
        UsageError: no field matches the topic.
    """
    known = load_fields()
    if list(topic) == [HELP_ALL]:
        return "\n".join([USAGE, *_everything(known)])
    words = [word for word in topic if not word.startswith("-")]
    return _about(words[0], known, "train") if words else "\n".join([USAGE, *_overview(known)])


def eval_help(topic: Sequence[str] = ()) -> str:
    """The help of ``eval``: all options, or those that match a topic.

    Raises:
        UsageError: no option matches the topic.
    """
    known = load_fields()
    own = read_fields_of("online_dpo.cli.evaluation.options", "EvalConfig")
    words = [word for word in topic if not word.startswith("-")]
    if words:
        return _about(words[0], {**own, **{name: known[name] for name in RUN_FIELDS}}, "eval")
    parts = [EVAL_USAGE, "Options:\n", *map(_entry, own.values()), "Fields of the run file that are used here:\n"]
    return "\n".join([*parts, *(_entry(known[name]) for name in RUN_FIELDS)])


def ray_help(topic: Sequence[str] = ()) -> str:
    """The help of ``ray``: all settings of the section, or those that match a topic.

    Raises:
        UsageError: no setting matches the topic.
    """
    own = read_fields_of(*RAY_SETTINGS)
    words = [word.removeprefix("ray.") for word in topic if not word.startswith("-")]
    if words:
        return _about(words[0], own, "ray")
    shown = (replace(spec, name=f"ray.{spec.name}") for spec in own.values())
    return "\n".join([RAY_USAGE, "Settings of the section `ray`:\n", *map(_entry, shown)])


def _overview(known: Mapping[str, FieldSpec]) -> Iterator[str]:
    for group, what in GROUPS.items():
        yield _names(f"{group}: {what}", [spec.name for spec in known.values() if spec.section == group])
    rest = sum(spec.group == PARENT for spec in known.values()) - len(USUAL)
    yield _names(f"of {PARENT} (and {rest} more, see --help-all)", USUAL)


def _names(heading: str, names: Iterable[str]) -> str:
    return f"{heading}\n" + textwrap.fill(
        "  ".join(names), width=110, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
    )


def _everything(known: Mapping[str, FieldSpec]) -> Iterator[str]:
    for group, what in GROUPS.items():
        yield f"{group}: {what}\n"
        yield from (_entry(spec) for spec in known.values() if spec.section == group)
    yield f"{PARENT}:\n"
    yield from (_entry(spec) for spec in known.values() if spec.group == PARENT)


def _about(word: str, known: Mapping[str, FieldSpec], command: str) -> str:
    """The help on a word: a field, a group, or all fields with the word in their name.

    Fields that only mention the word in their documentation are listed by name.
    """
    name = word.lower().replace("-", "_")
    if name in known:
        return _entry(known[name])
    matching = [spec for spec in known.values() if spec.section.lower() == name] or [
        spec for spec in known.values() if name in spec.name
    ]
    others = [spec.name for spec in known.values() if spec not in matching and name in spec.doc.lower()]
    if not matching and not others:
        hint = hint_for(word, known) or f" Groups: {', '.join(GROUPS)}."
        raise UsageError(
            [f"{COMMAND_LINE}: there is no field or group `{word}`.{hint} See: online-dpo {command} --help"]
        )
    return "\n".join(
        [*map(_entry, matching), *([_names(f"`{name}` is also mentioned in the text of", others)] if others else [])]
    )


def _entry(spec: FieldSpec) -> str:
    state = "required" if spec.required else f"default {spec.default}" if spec.default is not None else ""
    facts = "; ".join(fact for fact in (spec.annotation, state) if fact)
    choices = f" One of: {', '.join(spec.choices)}." if spec.choices else ""
    doc = textwrap.fill(
        " ".join((spec.doc + choices).split()), width=100, initial_indent=" " * 6, subsequent_indent=" " * 6
    )
    return f"  --{spec.name}  ({facts})\n{doc}\n" if doc else f"  --{spec.name}  ({facts})\n"
