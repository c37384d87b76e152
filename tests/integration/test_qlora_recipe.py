"""The recipe of QLoRA, from the command line, with a model that knows nothing."""

import json
from pathlib import Path

import pytest

from support import quantized
from support.processes import run_python

RECIPE = Path(__file__).parents[2] / "recipes" / "qlora.yaml"


@pytest.mark.slow
def test_the_recipe_trains_and_saves_an_adapter(tmp_path):
    folder = quantized.base_folder(tmp_path / "policy")
    rows = [{"question": f"w{n} w{n} w{n}", "answer": f"w{n}\n#### {n}"} for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run_python(
        *("-m", "online_dpo", "train", RECIPE, "--model_name_or_path", folder),
        *("--dataset_name", tmp_path / "prompts.jsonl", "--dataset_config", "null", "--output_dir", tmp_path / "run"),
        *("--max_steps", 2, "--logging_steps", 1, "--gradient_accumulation_steps", 1, "--use_cpu", "true"),
        *("--max_new_tokens", 8, "--max_length", 64, "--missing_eos_penalty", 5, "--learning_rate", 1e-2),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "gemm_4bit" not in done.stderr
    settings = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (16, 32)
    assert {"q_proj", "down_proj"} <= {name.split(".")[-1] for name in settings["target_modules"]}
    assert "(llama, nf4)" in (tmp_path / "run" / "README.md").read_text()
