"""`online-dpo init`, the headers of recipes, and their fields. tests/recipes runs what it writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from online_dpo.cli.init import files_of
from online_dpo.cli.main import main
from online_dpo.cli.recipes import FOLDER, PARTS, SCHEMA, read_recipe, recipe_names
from online_dpo.cli.runfile.schema import load_fields
from online_dpo.cli.runfile.values import convert
from support.processes import run_python

ROOT = Path(__file__).parents[3]
NAMES = recipe_names()
FIELDS = load_fields()
WORTH_SAYING = {("bf16", True), ("beta", 0.1)}


def wrong(capsys, *words) -> str:
    """The line of error."""
    assert main(["init", *map(str, words)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("error: ")
    return said.err.removeprefix("error: ").strip()


def test_without_a_name_it_lists_each_recipe_in_a_line(capsys):
    assert main(["init"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == NAMES
    assert "  lora            LoRA: a 7B chat model on one GPU." in lines
    assert lines[-1] == "Write one here: online-dpo init NAME"


def test_it_writes_the_recipe_with_what_it_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "llm-judge"]) == 0
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        *("llm-judge.yaml", "judges/rubric.txt", "run.schema.json")
    }
    text = (tmp_path / "llm-judge.yaml").read_text()
    first, _, rest = text.partition("\n")
    assert first == "# yaml-language-server: $schema=run.schema.json"
    assert rest == (FOLDER / "llm-judge.yaml").read_text().partition("\n")[2]
    assert (tmp_path / "run.schema.json").read_bytes() == SCHEMA.read_bytes()
    lines = capsys.readouterr().out.splitlines()
    assert "Written: llm-judge.yaml, judges/rubric.txt, run.schema.json" in lines
    assert "Change: `model_name_or_path`, `dataset_name`, `output_dir` in llm-judge.yaml." in lines
    at = lines.index("Then run:")
    assert lines[at + 1 : at + 3] == ["  online-dpo doctor llm-judge.yaml", "  online-dpo train llm-judge.yaml"]


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("gsm8k", {"rewards/gsm8k.py"}),
        ("mixed", {"rewards/mixed.py"}),
        ("fsdp2", {"accelerate/fsdp2.yaml"}),
        ("zero3", {"accelerate/zero3.yaml", "accelerate/zero3-offload.yaml"}),
        ("slurm", {"slurm.sbatch"}),
        ("ray", set()),
    ],
)
def test_files_that_a_recipe_names(name, files):
    assert files_of(read_recipe(name)).keys() == {f"{name}.yaml", "run.schema.json", *files}


def test_another_folder_is_made_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "slurm", "--to", "my runs/first"]) == 0
    out = capsys.readouterr().out
    assert "\n  cd 'my runs/first'\n  online-dpo doctor slurm.yaml --processes 16\n  sbatch slurm.sbatch\n" in out
    assert (tmp_path / "my runs" / "first" / "slurm.sbatch").is_file()


def test_nothing_of_the_users_is_replaced_unless_forced(tmp_path, capsys):
    assert main(["init", "gsm8k", "--to", str(tmp_path)]) == 0
    assert main(["init", "gsm8k", "--to", str(tmp_path)]) == 0  # the same again
    reward = tmp_path / "rewards" / "gsm8k.py"
    reward.write_text("mine = 1\n")
    (tmp_path / "gsm8k.yaml").unlink()
    (tmp_path / "run.schema.json").write_text("{}")  # of another version
    capsys.readouterr()
    line = wrong(capsys, "gsm8k", "--to", tmp_path)
    assert line == f"{reward} exists. Give another folder with --to, or --force to replace it."
    assert reward.read_text() == "mine = 1\n" and not (tmp_path / "gsm8k.yaml").exists()
    assert main(["init", "gsm8k", "--to", str(tmp_path), "--force"]) == 0
    assert reward.read_text() == (FOLDER / "rewards" / "gsm8k.py").read_text()
    assert (tmp_path / "run.schema.json").read_bytes() == SCHEMA.read_bytes()


def test_two_recipes_share_a_reward(tmp_path):
    for name in ("gsm8k", "qlora"):
        assert main(["init", name, "--to", str(tmp_path)]) == 0


@pytest.mark.parametrize("name", ["nash_md", "NASH-MD", "nash-md.yaml", "nash md"])
def test_other_ways_to_write_a_name(tmp_path, name):
    assert main(["init", name, "--to", str(tmp_path)]) == 0
    assert (tmp_path / "nash-md.yaml").is_file()


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("gsm", "Did you mean `gsm8k`?"),
        ("llmjudge", "Did you mean `llm-judge`?"),
        ("judge", "Did you mean `llm-judge`?"),
        ("zero-3", "Did you mean `zero3`?"),
        ("../gsm8k", "Did you mean `gsm8k`?"),
        ("zzzzzz", f"There are: {', '.join(NAMES)}."),
        ("", f"There are: {', '.join(NAMES)}."),
    ],
)
def test_a_wrong_name_is_one_line_with_the_nearest(tmp_path, monkeypatch, capsys, word, hint):
    monkeypatch.chdir(tmp_path)
    assert wrong(capsys, word) == f"there is no recipe {word!r}. {hint} `online-dpo init` lists them."
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert wrong(capsys, "hh", "--to", tmp_path / "file").endswith("file is no folder. Give another one with --to.")
    assert "is in the way of" in wrong(capsys, "hh", "--to", tmp_path / "file" / "below")
    (tmp_path / "hh.yaml").mkdir()
    assert f"{tmp_path / 'hh.yaml'} is in the way of" in wrong(capsys, "hh", "--to", tmp_path, "--force")
    with pytest.raises(SystemExit) as exit:
        main(["init", "hh", "--output_dir", "x"])
    assert exit.value.code == 2 and "Here it is `to`" in capsys.readouterr().err


def test_it_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from online_dpo.cli.main import main; main(['init', 'gsm8k', '--to', sys.argv[1]])\n"
        "assert not {'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)"
    )
    done = run_python("-c", code, tmp_path)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", NAMES)
def test_the_header_has_one_form(name):
    recipe = read_recipe(name)
    header = recipe.text.partition("\n\n")[0].splitlines()
    assert [line[2:] for line in header[2:] if re.match(r"# \S", line)][-4:] == list(PARTS)
    assert all(len(line) <= 120 for line in recipe.text.splitlines())
    assert recipe.line.endswith(".") and len(recipe.line) <= 150
    assert "GPU" in recipe.needs
    doctor = [command for command in recipe.commands if command.startswith(f"online-dpo doctor {name}.yaml")]
    assert doctor == [recipe.commands[-2]]
    assert f"{name}.yaml" in recipe.commands[-1] or recipe.commands[-1] == f"sbatch {name}.sbatch"
    assert yaml.safe_load(recipe.text)["output_dir"] == f"runs/{name}"


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_a_field_and_says_something(name):
    """None repeats a default, but for a few that a reader should see."""
    for field, value in yaml.safe_load(read_recipe(name).text).items():
        assert field in FIELDS, field
        taken, default = convert(FIELDS[field], value), FIELDS[field].default
        assert taken != default and [taken] != default or (field, value) in WORTH_SAYING, (field, value)


def test_a_header_of_another_form_is_an_error(tmp_path):
    file = tmp_path / "hh.yaml"
    text = (FOLDER / "hh.yaml").read_text()
    for broken in (text.replace("# Needs\n", ""), text.replace("../src/online_dpo/run", "run")):
        file.write_text(broken)
        with pytest.raises(ValueError, match="recipe hh has to"):
            read_recipe("hh", tmp_path)


def test_the_page_has_the_present_table(tmp_path):
    page = ROOT / "docs" / "guides" / "recipes.md"
    copy = tmp_path / "recipes.md"
    copy.write_text(page.read_text())
    assert run_python(ROOT / "scripts" / "recipes_table.py", copy).returncode == 0
    assert copy.read_text() == page.read_text(), "python scripts/recipes_table.py docs/guides/recipes.md"


def test_the_package_has_the_folder_of_the_repository():
    assert (ROOT / "recipes").resolve() == FOLDER.resolve()


@pytest.mark.parametrize("name", NAMES)
def test_metrics_and_fields_that_a_header_names_exist(name):
    metrics = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    recipe = read_recipe(name)
    for word in re.findall(r"`([^`]+)`", f"{recipe.what} {recipe.needs} {recipe.expect}"):
        group, slash, _ = word.partition("/")
        if slash and re.fullmatch("[a-z_/]+", word) and group != "runs":
            assert f"`{word}`" in metrics or group == "dropped", word
        elif re.fullmatch("[a-z]+_[a-z_]+", word):
            assert word in FIELDS or word == "judge_kwargs", word
