"""Every recipe, written by `online-dpo init` into an empty folder and run by its own command, with smaller settings."""

from __future__ import annotations

import json
import shlex
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from online_dpo.cli.main import main
from online_dpo.cli.recipes import read_recipe, recipe_names
from support import pairwise_folders
from support.endpoint import serving
from support.llm_judges import longer_wins
from support.recipe_runs import SMALL, Recipes, launch, options

WITHOUT_VLLM = {"use_vllm": "false"}
"""vLLM is in an environment of its own: tests/vllm_engines runs these recipes with it."""
CHANGES: dict[str, dict] = {
    "fsdp2": {},
    "gsm8k": {},
    "hh": {},
    "llm-judge": {},
    "long-context": {"max_length": 2048},
    "lora": {},
    "mixed": {},
    "nash-md": {},
    "pairwise-judge": {},
    "qlora": {},
    "ray": {"max_staleness": 0},
    "reward-model": {},
    "semi-online": WITHOUT_VLLM,
    "slurm": {},
    "thinking": {},
    "tldr": {"eval_limit": 4},
    "vllm": WITHOUT_VLLM,
    "vllm-server": WITHOUT_VLLM,
    "xpo": {},
    "zero3": {},
}
"""What a recipe needs changed beside `SMALL`. A new recipe needs a line."""
OF_THE_MACHINE = ("memory", "device", "disk")
"""What the doctor finds here says nothing of the GPUs that a recipe is for."""
SAID = {
    "fsdp2": "FSDP2 over 2 processes",
    "slurm": "FSDP2 over 2 processes",
    "ray": "FSDP2 over 2 processes",
    "zero3": "ZeRO-3 over 2 processes",
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    made = Recipes(tmp_path_factory.mktemp("recipes"))
    yield made
    made.close()


def test_every_recipe_has_a_run():
    assert list(CHANGES) == recipe_names()


@contextmanager
def beside(name: str, folder: Path):
    """What a recipe needs that `init` cannot write: fields that name it, while it is there."""
    if name == "pairwise-judge":
        (folder / "models").mkdir()
        pairwise_folders.pairrm_folder(folder / "models" / "PairRM-hf")
    if name != "llm-judge":
        yield {}
        return
    with serving(longer_wins) as endpoint:
        kwargs = yaml.safe_load((folder / "llm-judge.yaml").read_text())["judge_kwargs"]
        yield {"judge_kwargs": kwargs | {"base_url": endpoint.url, "cache": str(folder / "cache.sqlite3")}}
        assert endpoint.seen


@pytest.mark.parametrize("name", recipe_names())
def test_what_init_wrote_runs(recipes, tmp_path, name):
    assert main(["init", name, "--to", str(tmp_path)]) == 0
    words, ranks = launch(read_recipe(name), tmp_path)
    with beside(name, tmp_path) as needed:
        ended = recipes.run(tmp_path, [*words, *options(SMALL | CHANGES[name] | needed)], ranks)
    for rank in ended:
        assert not rank.hung, rank.stack
        assert rank.code == 0, rank.printed[-6000:]
    assert "step 2/2" in ended[0].printed
    assert SAID.get(name, "") in ended[0].printed
    output = tmp_path / "runs" / name
    weights = "adapter_model.safetensors" if "use_peft" in read_recipe(name).text else "model.safetensors"
    assert (output / weights).is_file()


@pytest.mark.parametrize("name", recipe_names())
def test_the_doctor_has_no_objection(recipes, tmp_path, name):
    """The light checks of the doctor, by the recipe's own line, of the recipe as it is but for GPU and vLLM."""
    assert main(["init", name, "--to", str(tmp_path)]) == 0
    [words] = [shlex.split(command)[1:] for command in read_recipe(name).commands if " doctor " in command]
    absent = WITHOUT_VLLM if CHANGES[name] is WITHOUT_VLLM else {}
    with beside(name, tmp_path) as needed:
        more = options(needed | absent | {"use_cpu": "true"})
        [ended] = recipes.run(tmp_path, [*words, "--quick", "--json", *more])
    assert not ended.hung and ended.code in (0, 1), ended.printed
    found = json.loads(ended.stdout)["findings"]
    objections = [finding for finding in found if finding["mark"] in ("problem", "warning")]
    about = [finding["found"] for finding in objections if finding["check"] not in OF_THE_MACHINE]
    assert [text for text in about if not absent or "vllm" not in text] == []
    assert {"prompts", "settings", "run file"} <= {finding["check"] for finding in found if finding["mark"] == "ok"}
