"""The recipe that samples with vLLM in the trainer's process, by its own command; tests/recipes runs it without."""

import os

from online_dpo.cli.main import main
from support import vllm_tools
from support.hub import make_hub
from support.processes import environment, run_python

SMALL = ("--max_steps", 2, "--logging_steps", 1, "--per_device_train_batch_size", 4, "--save_strategy", "no")
SHORT = ("--gradient_accumulation_steps", 1, "--max_new_tokens", 12, "--max_length", 256, "--use_cpu", "true")


def test_vllm_in_process(tmp_path):
    names = ("Qwen/Qwen2.5-1.5B-Instruct", "Skywork/Skywork-Reward-V2-Qwen3-0.6B", "trl-lib/ultrafeedback-prompt")
    variables = make_hub(tmp_path / "hub", *names)
    assert main(["init", "vllm", "--to", str(tmp_path)]) == 0
    done = run_python(
        *("-m", "online_dpo", "train", "vllm.yaml", *SMALL, *SHORT),
        cwd=tmp_path,
        env=environment(**(vllm_tools.ENVIRONMENT | variables)),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "step 2/2" in done.stdout and "vllm" in done.stdout
    assert os.path.isfile(tmp_path / "runs" / "vllm" / "model.safetensors")
