"""The script of examples/ that samples with vLLM servers, with a real one."""

import importlib.util
import json
from pathlib import Path

from support import tiny, vllm_tools

FAMILY = "llama-untied"  # whose folder is loaded with the tokenizer that it holds; a server that other tests use too
SCRIPT = Path(__file__).parents[2] / "examples" / "vllm_servers.py"


def test_the_script_trains_on_what_a_server_samples(server_of, tmp_path):
    spec = importlib.util.spec_from_file_location("vllm_servers", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    policy = vllm_tools.policy(FAMILY)
    for saved in (policy, tiny.tokenizer()):
        saved.save_pretrained(tmp_path / "policy")
    rows = [json.dumps({"prompt": prompt.content}) for prompt in tiny.prompts([3, 5, 4, 6] * 4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    given = {"model": tmp_path / "policy", "prompts": tmp_path / "prompts.jsonl", "output": tmp_path / "out"}
    given |= {"servers": server_of(FAMILY).url, "steps": 5, "tokens": 8}
    history = script.main([word for name, value in given.items() for word in (f"--{name}", str(value))])
    [log] = [log for log in history if "pairs/count" in log]
    assert log["step"] == 5 and log["sampling/staleness"] > 0
    assert log["sampling/sampling_logp_difference/max"] < 1e-3
