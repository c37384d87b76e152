"""What can be known of a model's folder before anything is loaded: from its JSON files and the headers of its weights.

Nothing heavy is imported here, so that the command line can look as well.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from online_dpo.config.weight_files import WrongWeights, tensors_in
from online_dpo.errors import one_line

Role = Literal["policy", "reference", "reward", "judge"]

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
GENERATION_CONFIG = "generation_config.json"
CHOOSE_FILES = ("subfolder", "variant", "gguf_file", "use_safetensors", "state_dict")
"""Options of loading that make other files than the usual ones count."""
MOST_BYTES = 20_000_000
"""Of a JSON file that is read here. The largest indexes of published models have a tenth of that."""
LARGEST = 10**9
AT_LEAST = {
    "vocab_size": 1,
    "hidden_size": 1,
    "intermediate_size": 0,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "num_attention_heads": 1,
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 1,
}
"""Sizes in a model's config, and the lowest number that makes sense."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
NO_LANGUAGE_MODEL = re.compile(
    r"(For(Sequence|Token|Image|Audio|Video)\w*Classification|ForQuestionAnswering|ForMaskedLM|ForMultipleChoice"
    r"|ForNextSentencePrediction|ForObjectDetection|ForCTC|RewardModel)$"
)
"""Names of classes that predict no next token."""
DTYPE = re.compile(r"(torch\.)?(auto|half|float|double|bfloat16|float(16|32|64)|float8_\w+)")


class WrongFolder(ValueError):
    """A model's folder cannot be used. The message says what is wrong, and continues ``the folder ...``."""


def folder_problem(folder: str, role: Role, options: Mapping[str, Any] | None = None) -> str | None:
    """What is wrong with a local folder as the model of this role, or nothing. A path that is no folder has no problem
    here: it may be a name on the hub.

    Args:
        options: further arguments of ``from_pretrained``.

    >>> folder_problem("bert-base", "policy")
    'bert-base: config.json says BertForMaskedLM, which is no causal language model. ...'
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        return None
    try:
        check_folder(path, role, options or {})
    except (WrongFolder, WrongWeights) as problem:
        return f"{folder}: {problem}"
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror or error}."
    return None


def check_folder(path: Path, role: Role, options: Mapping[str, Any]) -> None:
    """Check a folder with a model or with an adapter.

    Raises:
        WrongFolder, WrongWeights, OSError: it cannot be used.
    """
    if (path / ADAPTER_CONFIG).is_file():
        _check_adapter(path, role, options)
        return
    if not (path / CONFIG).is_file():
        return  # whoever loads it says what it needs
    config = read_object(path / CONFIG)
    _check_config(config, role)
    if (path / GENERATION_CONFIG).is_file():
        _check_token_ids(read_object(path / GENERATION_CONFIG), GENERATION_CONFIG)
    if any(options.get(name) is not None for name in CHOOSE_FILES):
        return
    shapes = tensors_in(path, "model", quantised=_is_quantised(config, options))
    if shapes is not None:
        _check_layers(config, len(shapes))


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        WrongFolder: it does not, or holds a number that is NaN.
    """
    if path.stat().st_size > MOST_BYTES:
        raise WrongFolder(f"{path.name} has {path.stat().st_size} bytes, too many for a model's settings.")
    try:
        read = json.loads(path.read_bytes(), parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        if isinstance(error, WrongFolder):
            raise WrongFolder(f"{path.name} {error}") from None
        what = "too deeply nested" if isinstance(error, RecursionError) else one_line(str(error), 120)
        raise WrongFolder(f"{path.name} is no valid JSON ({what}). Copy or download it again.") from None
    if not isinstance(read, dict):
        raise WrongFolder(f"{path.name} holds no JSON object. Copy or download it again.")
    return read


def _constant(text: str) -> float:
    if text == "NaN":
        raise WrongFolder("holds a number that is NaN. Mend it.")
    return float(text)  # infinities are limits in some models


def _check_config(config: dict[str, Any], role: Role) -> None:
    if not isinstance(config.get("model_type", ""), str):
        raise WrongFolder(f"{CONFIG}: `model_type` is no name of a type of models.")
    for name in ("dtype", "torch_dtype"):
        if isinstance(config.get(name), str) and not DTYPE.fullmatch(config[name]):
            raise WrongFolder(f"{CONFIG}: `{name}` is {one_line(config[name], 40)!r}, which is no type of weights.")
    _check_token_ids(config, CONFIG)
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name, problem in _size_problems(part):
            raise WrongFolder(f"{CONFIG}: `{name}` {problem}")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise WrongFolder(f"{CONFIG}: `architectures` is no list of names.")
    if role in ("policy", "reference"):
        _check_predicts_tokens(architectures, has_code="auto_map" in config)
    if role == "reward":
        _check_labels(config, architectures)


def _check_token_ids(config: dict[str, Any], file: str) -> None:
    for name in TOKEN_IDS:
        value = config.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(one, bool) or not isinstance(one, int) for one in ids):
            raise WrongFolder(f"{file}: `{name}` is {one_line(repr(value), 40)}; wanted: the id of a token.")
    pad, known = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(known, int) and pad >= known:
        raise WrongFolder(f"{file}: `pad_token_id` is {pad}, but the vocabulary has {known} tokens (`vocab_size`).")


def _size_problems(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, least in AT_LEAST.items():
        value = config.get(name)
        if value is None or isinstance(value, (list, dict)):  # one for each layer
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            yield name, f"is {one_line(repr(value), 40)}; wanted: a whole number."
        elif not least <= value <= LARGEST:
            yield name, f"is {one_line(str(value), 40)}, which no model has."


def _check_predicts_tokens(architectures: list[str], has_code: bool) -> None:
    for name in architectures:
        if NO_LANGUAGE_MODEL.search(name) or (name.endswith("Model") and "LMHead" not in name and not has_code):
            raise WrongFolder(
                f"{CONFIG} says {one_line(name, 60)}, which is no causal language model: it predicts no next token. "
                "Give a model whose architecture ends in `ForCausalLM`."
            )


def _check_labels(config: dict[str, Any], architectures: list[str]) -> None:
    """Check that what the config says of its labels is one score."""
    for name in architectures:
        if name.endswith(("ForTokenClassification", "ForCausalLM", "LMHeadModel")):
            raise WrongFolder(
                f"{CONFIG} says {one_line(name, 60)}, which is no reward model: its head that scores a text would be "
                "random. Give a model that was trained and saved for sequence classification with one label."
            )
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 1)
    if count != 1:
        raise WrongFolder(
            f"{CONFIG} has {count} labels. A reward model must have a head with one label (num_labels=1)."
        )
    if (kind := config.get("problem_type")) not in (None, "regression"):
        raise WrongFolder(
            f"{CONFIG}: `problem_type` is {one_line(str(kind), 40)!r}, which names classes; the one label of a reward "
            "model is a score. If this one is, remove `problem_type`."
        )


def _is_quantised(config: dict[str, Any], options: Mapping[str, Any]) -> bool:
    settings = (config.get("quantization_config"), config.get("compression_config"), options.get("quantization_config"))
    return any(setting is not None for setting in settings)


def _check_layers(config: dict[str, Any], tensors: int) -> None:
    for name in LAYERS:
        if isinstance(config.get(name), int) and config[name] > tensors:
            raise WrongFolder(f"{CONFIG}: `{name}` is {config[name]}, but the weights are {tensors} tensors.")


def _check_adapter(path: Path, role: Role, options: Mapping[str, Any]) -> None:
    config = read_object(path / ADAPTER_CONFIG)
    tensors_in(path, "adapter_model", quantised=False)
    base = config.get("base_model_name_or_path")
    if not base:
        return  # whoever loads it says what it needs
    if not isinstance(base, str):
        raise WrongFolder(f"{ADAPTER_CONFIG}: `base_model_name_or_path` is no name.")
    folder = Path(base).expanduser()
    if not folder.is_dir():
        if base.startswith((os.sep, ".", "~")) or base.count("/") > 1:
            raise WrongFolder(f"its base model {one_line(base, 200)!r} ({ADAPTER_CONFIG}) is not there.")
        return
    if not (folder / CONFIG).is_file():
        raise WrongFolder(f"its base model {base} holds no {CONFIG}; an adapter needs a whole model as its base.")
    if role == "reward":
        return  # its head may come with the adapter
    try:
        check_folder(folder, role, options)
    except (WrongFolder, WrongWeights) as problem:
        raise WrongFolder(f"its base model {base}: {problem}") from None
