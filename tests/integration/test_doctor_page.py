"""The sample of docs/guides/doctor.md is what the command prints, but for numbers and paths."""

import json
import re
from pathlib import Path

from online_dpo.cli.main import main
from support.run_files import fill_folder, write_run_file

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "doctor.md"
BEGIN, END = "<!-- sample: tests/integration/test_doctor_page.py -->\n\n```text\n", "```\n\n<!-- end of sample -->"
REWARD = "def always_good(completions, **columns):\n    return [1.0] * len(completions)\n"


def without_numbers(text):
    return re.sub(r"\d[\w.+]*", "#", text)


def test_the_sample(tmp_path, capsys):
    fill_folder(tmp_path, REWARD)
    rows = [json.dumps({"prompt": "w1 " * (8 + 2 * n)}) for n in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    assert main(["doctor", str(write_run_file(tmp_path, reward_funcs="feedback.py:always_good"))]) == 1
    lines = capsys.readouterr().out.replace(f"{tmp_path}/", "").splitlines(keepends=True)
    printed = "".join(line for line in lines if "get_accelerator" not in line)  # DeepSpeed's, imported by another test
    printed = re.sub(r"free in \S+;", "free in runs;", printed)
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    sample, after = rest.split(END)
    if without_numbers(printed) != without_numbers(sample):
        (tmp_path / "sample.txt").write_text(printed)
    assert without_numbers(printed) == without_numbers(sample), f"{tmp_path}/sample.txt has what it prints now"
