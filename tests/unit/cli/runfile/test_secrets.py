"""Run files and command lines that hold keys, or texts that act on a terminal."""

from __future__ import annotations

import pytest

from online_dpo.cli.main import main
from online_dpo.cli.runfile.entries import UsageError
from online_dpo.cli.runfile.run_file import plan_run
from online_dpo.scoring.judge_registry import check_judge
from online_dpo.scoring.registry import check_scorers

KEY = "sk-secret-0123456789"
RUN = "model_name_or_path: org/model\ndataset_name: org/data\n"


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (f"reward_model_path: https://me:{KEY}@host/reward", "reward_model_path"),
        (f"reward_funcs: ['https://host/score?api_key={KEY}']", "reward_funcs"),
        (f"judge: https://{KEY}@host/v1", "judge"),
        (f"judge: llm\njudge_kwargs: {{model: m, base_url: 'https://host/v1?token={KEY}'}}", "judge_kwargs"),
        (f"judge: llm\njudge_kwargs: {{model: m, extra: {{callback: 'https://a:{KEY}@host'}}}}", "judge_kwargs"),
        (f"reward_funcs: a.py:b\nvllm_server_base_url: http://me:{KEY}@host:8000", "vllm_server_base_url"),
        (f"reward_funcs: a.py:b\neval_dataset_name: https://host/x.jsonl?sig={KEY}", "eval_dataset_name"),
    ],
)
def test_a_secret_in_a_run_file_is_one_line_that_does_not_show_it(tmp_path, capsys, text, field):
    path = tmp_path / "run.yaml"
    path.write_text(RUN + text)
    line = 3 + text.count("\n")
    with pytest.raises(UsageError) as caught:
        plan_run(path, [])
    assert any(
        p.startswith(f"{path}:{line}: `{field}` holds an address with a user name") for p in caught.value.problems
    )
    assert main(["train", str(path)]) == 2
    out = capsys.readouterr()
    assert KEY not in out.out + out.err + str(caught.value) and "Put the key into an environment variable" in out.err


def test_a_secret_on_the_command_line(capsys):
    assert main(["train", "--model_name_or_path", "m", "--reward_model_path", f"https://me:{KEY}@host/x"]) == 2
    out = capsys.readouterr()
    assert "command line: `reward_model_path` holds an address" in out.err and KEY not in out.err + out.out


def test_problems_cannot_act_on_a_terminal(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(RUN + 'reward_funcs: "\\e]0;title\\a\\e[2J\\u202egnp.exe:\\e[31mx"\n"\\e[1mfield": 1\n')
    assert main(["train", str(path)]) == 2
    err = capsys.readouterr().err
    assert "gnp.exe" in err and all(line.isprintable() for line in err.splitlines())


def test_addresses_in_python_are_not_shown_as_names(tmp_path):
    from online_dpo.config.trainer_config import OnlineDPOConfig

    url = f"https://me:{KEY}@host/v1?token={KEY}"
    with pytest.raises(ValueError, match=r"give `HTTPReward\(address\)`") as caught:
        check_scorers(url, None, OnlineDPOConfig(str(tmp_path), use_cpu=True))
    assert KEY not in str(caught.value)
    with pytest.raises(ValueError, match=r"give `LLMJudge\(model=..., base_url=address\)`") as caught:
        check_judge(url, "judge")
    assert KEY not in str(caught.value)
