"""Checks of a model right after it was loaded: that every weight is its folder's, and that none is obviously torn.

Libraries fill what a folder lacks with random numbers, and leave out what they do not know; both with a table on stderr
at most. Here the first is an error and the second a warning of one line, or an error where it drops layers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from online_dpo.errors import ModelFolderError, one_line
from online_dpo.modeling.quantization import named_numbers

logger = logging.getLogger(__name__)

REPORT = "LOAD REPORT"
PROBED = 1024
SHOWN = 3
CLASSIFIERS = re.compile(r"(score|classifier|qa_outputs)\.")
"""Names of heads that predict no token."""
EMBEDDINGS = re.compile(r"embed|lm_head|wte")
"""Names of what PEFT saves beside an adapter."""
ZEROS_BY_DESIGN = re.compile(r"token_type_embeddings|lora_embedding_A|\.lora_B\.|\.bias$")
"""Names of matrices that are zeros in published models, or in an adapter that is not trained yet."""


class _Report(logging.Filter):
    """Keeps the table that transformers logs of a folder's weights away from stderr."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if REPORT in text:
            self.text = text
        return REPORT not in text


@contextmanager
def without_report() -> Iterator[None]:
    """Inside, transformers logs no table of missing and unexpected weights: what it says is checked afterwards."""
    report, source = _Report(), logging.getLogger("transformers.modeling_utils")
    source.addFilter(report)
    try:
        yield
    except RuntimeError as error:
        if not report.text or "above report" not in str(error):
            raise
        raise ModelFolderError(f"its weights do not fit its config ({one_line(report.text, 400)})") from error
    finally:
        source.removeFilter(report)


def check_loaded(model: nn.Module, info: Mapping[str, Any], path: str, what: str = "model") -> None:
    """Check what loading says of a folder's weights, and the weights themselves.

    Args:
        info: as ``from_pretrained(..., output_loading_info=True)`` returns it.
        what: the folder should hold.

    Raises:
        ModelFolderError: weights are missing, of another shape, or layers of them left out.
    """
    if info["mismatched_keys"]:
        name, saved, wanted = min(info["mismatched_keys"])
        raise ModelFolderError(
            f"`{path}`: `{name}` has the shape {tuple(saved)}, and by its config.json {tuple(wanted)}. The weights "
            "belong to another config; copy or download both again."
        )
    if info["missing_keys"]:
        raise ModelFolderError(
            f"`{path}` is no trained {what}: it has no weights for {_some(info['missing_keys'])}, which would be "
            "random. Copy or download it again, or give another model."
        )
    if not getattr(model, "is_quantized", False):
        _check_left_out(model, info["unexpected_keys"], path)


def _check_left_out(model: nn.Module, names: Iterable[str], path: str) -> None:
    """Check the weights that are in the folder and not in the model."""
    kinds = {_without_numbers(name) for name, _ in model.named_parameters()}
    layers = [name for name in names if re.search(r"\.\d+\.", name) and _without_numbers(name) in kinds]
    heads = [name for name in names if CLASSIFIERS.match(name) and hasattr(model, "lm_head")]
    if heads:
        raise ModelFolderError(
            f"`{path}` is no causal language model: it has the head of a classifier ({_some(heads)}). Give the model "
            "that it was trained from."
        )
    if layers:
        raise ModelFolderError(
            f"`{path}` has weights of more layers than its config.json says, such as {_some(layers)}; they would be "
            "left out. Give the config that belongs to the weights."
        )
    if names:
        logger.warning("`%s` holds weights that its model has no place for; they are ignored: %s.", path, _some(names))


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(f"`{one_line(name, 100)}`" for name in listed[:SHOWN]) + more


def check_not_zero(model: nn.Module, path: str) -> None:
    """Check that no matrix holds nothing but zeros, as a download or a disk that has failed leaves it.

    Raises:
        ModelFolderError: one does.
    """
    for name, parameter in named_numbers(model):
        if parameter.dim() > 1 and not ZEROS_BY_DESIGN.search(name) and _is_zero(parameter):
            raise ModelFolderError(
                f"`{path}`: `{name}` holds nothing but zeros, as a download or a disk that has failed leaves it. Copy "
                "or download it again."
            )


def _is_zero(parameter: torch.Tensor) -> bool:
    tensor = parameter.detach()
    if isinstance(tensor, DTensor) or tensor.is_meta or not tensor.numel() or tensor.itemsize < 2:
        return False
    return not bool(tensor.flatten()[:PROBED].any()) and not bool(tensor.any())


def check_loaded_adapter(model: Any, saved: Iterable[str] | None, path: str) -> None:
    """Check an adapter of PEFT right after it was loaded.

    Args:
        saved: the names of the folder's tensors, if they are known.

    Raises:
        ModelFolderError: a tensor of the folder has no place in the model, or a matrix is zero that nothing is
            learnt from.
    """
    from peft import get_peft_model_state_dict

    if saved is not None:
        left = set(saved) - get_peft_model_state_dict(model, save_embedding_layers=False).keys()
        left = {name for name in left if not EMBEDDINGS.search(name)}
        if any("lora_" in name for name in left):
            raise ModelFolderError(
                f"`{path}` holds adapter weights that its adapter_config.json has no place for: {_some(left)}. They "
                "would be left out; give the config that belongs to the weights."
            )
        if left:
            logger.warning(
                "`%s` holds weights that its model has no place for; they are ignored: %s.", path, _some(left)
            )
    zero = {name: _is_zero(parameter) for name, parameter in model.named_parameters() if ".lora_" in name}
    ends = {name: is_zero for name, is_zero in zero.items() if ".lora_B." in name}
    for name, is_zero in zero.items():
        if is_zero and ".lora_A." in name:
            raise ModelFolderError(f"`{path}`: `{name}` holds nothing but zeros. Copy or download the adapter again.")
    if any(ends.values()) and not all(ends.values()):  # all are in an adapter that is not trained yet
        logger.warning(
            "`%s`: parts of the adapter are zeros: %s.", path, _some(n for n, is_zero in ends.items() if is_zero)
        )


def check_finite(model: nn.Module, path: str) -> None:
    """Check that all weights are numbers. For models that a run only reads; those that it trains are checked in it.

    Raises:
        ModelFolderError: a weight is NaN or infinite.
    """
    for name, parameter in named_numbers(model):
        tensor = parameter.detach()
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel() and not tensor.is_meta:
            least, most = torch.aminmax(tensor)
            if not bool(least.isfinite() & most.isfinite()):
                raise ModelFolderError(
                    f"`{path}`: `{name}` holds numbers that are NaN or infinite. Give a model that is whole, and load "
                    "it in a type that holds its weights."
                )


def check_config(config: PreTrainedConfig, path: str) -> None:
    """Check what a model's config says of its class and its quantisation.

    Raises:
        ModelFolderError: it names a class of another type of models, or a quantisation that transformers would skip.
    """
    import transformers

    settings = getattr(config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is not None and str(method) not in AUTO_QUANTIZATION_CONFIG_MAPPING and not _is_bits(settings):
        raise ModelFolderError(
            f"`{path}`: config.json wants the quantisation {one_line(str(method), 40)!r}, which this version of "
            "transformers does not know; the weights would be read as they stand. Give a version that does."
        )
    for name in () if getattr(config, "auto_map", None) else config.architectures or ():
        named = getattr(transformers, name, None)
        owner = getattr(named, "config_class", None)
        if owner is not None and owner.model_type != config.model_type:
            raise ModelFolderError(
                f"`{path}`: config.json contradicts itself: its class is {name}, and its `model_type` "
                f"{config.model_type!r}. Copy or download it again."
            )


def _is_bits(settings: Any) -> bool:
    return bool(settings.get("load_in_4bit") or settings.get("load_in_8bit"))
