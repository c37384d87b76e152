"""What is registered outside of the package, through `plugins` in a run file and by an import in Python."""

import importlib.util
import json
import math

import pytest

from online_dpo.cli.main import main
from online_dpo.rollout.engine import Engine
from online_dpo.training.metric_registry import METRICS, metric, record_registered
from online_dpo.training.metric_store import MetricStore
from support import tiny
from support.plugins import names_restored
from support.run_files import fill_folder, trainer_of, write_run_file
from support.training import config, trainer

LOSS = """
from online_dpo.objective.losses import loss

@loss("plain_gap")
def gap(pairs, options):
    return options.beta * (0.25 * pairs.chosen_N - pairs.rejected_N)
"""

STRATEGY = """
import json
from pathlib import Path
from online_dpo.pairing.strategies import strategy
from online_dpo.training.metric_registry import metric

@strategy("second_of_all")
def second(scored, draw):
    ordered = sorted(scored)
    return [(ordered[1], ordered[0])]

@metric("mine/margins")
def margins(feedback, pairing):
    rows = [[p.chosen_score, p.rejected_score] for p in pairing.pairs]
    values = feedback.said.values
    with open(Path(__file__).with_name("picked.jsonl"), "a") as file:
        file.write(json.dumps({"pairs": rows, "scores": values}) + "\\n")
    return [p.margin for p in pairing.pairs]
"""

ENGINE = """
from online_dpo.rollout.registry import engine
from online_dpo.types import Completion, Group

class Fixed:
    has_own_weights, overlaps, own_dtype = False, False, None

    def __init__(self, pad):
        self.pad, self.version = pad, -1

    def sync(self, model, version):
        self.version = version

    def generate(self, prompts, num_completions, params, key):
        def answer(k):
            text = " ".join(["w6"] * (k + 1))
            return Completion((10,) * (k + 1) + (1,), (0.0,) * (k + 2), "stop", self.version, text)
        return [Group(prompt, tuple(map(answer, range(num_completions)))) for prompt in prompts]

    def release(self): ...
    def close(self): ...

@engine("fixed")
def build(policy, tokenizer, args):
    return Fixed(tokenizer.pad_token_id)
"""

METHOD = """
from online_dpo.methods.base import Method, method
from online_dpo.objective.losses import pair_losses
from online_dpo.types import Pairing

@method("thrice")
class Thrice(Method):
    epoch_fields = ("xpo_alpha",)

    def check(self, args):
        if args.temperature != 0.5:
            raise ValueError("`method='thrice'` needs `temperature` 0.5.")

    def form_pairs(self, groups, assessment, selection, draw):
        made = super().form_pairs(groups, assessment, selection, draw)
        return Pairing(made.pairs[:1], made.dropped)

    def losses(self, pairs, options):
        return 3 * pair_losses(pairs, options) + options.own["xpo_alpha"]
"""

SCORERS = """
from online_dpo.scoring.judge_registry import judge
from online_dpo.scoring.registry import reward
from online_dpo.training.metric_registry import metric

made = []

@reward("counting")
def count(completions, **columns):
    return [float(k % 4) for k in range(len(completions))]

@judge("alphabet")
class Alphabet:
    name = "alphabet"

    def __init__(self):
        made.append(self)

    def judge(self, prompts, completion_pairs, shuffle_order=True):
        return [int(second < first) for first, second in completion_pairs]

@judge("even_odds")
def odds(prompt, first, second):
    return 0.9 if first < second else 0.1

@metric("mine/made")
def made_so_far(feedback, pairing):
    return len(made)

@metric("mine/some")
def some(feedback, pairing):
    return [1.0, float("nan"), 5.0]
"""
PLUGINS = {"loss": LOSS, "strategy": STRATEGY, "engine": ENGINE, "method": METHOD, "scorers": SCORERS}

REWARD = """
def count_words(completions, **_):
    return [float(sum(len(word) == 2 for word in text.split())) for text in completions]
"""


@pytest.fixture(autouse=True)
def free_names():
    with names_restored():
        yield


@pytest.fixture
def folder(tmp_path):
    fill_folder(tmp_path, REWARD)
    for name, text in PLUGINS.items():
        (tmp_path / f"my_{name}.py").write_text(text)
    return tmp_path


def run(folder, plugin, **fields):
    """The logs of a run of two steps."""
    rewards = {} if "judge" in fields else {"reward_funcs": "feedback.py:count_words"}
    made = trainer_of(write_run_file(folder, plugins=[f"my_{plugin}.py"], max_steps=2, **{**rewards, **fields}))
    made.train()
    return made, [log for log in made.state.log_history if "prompts" in log]


def imported(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_loss(folder, tmp_path):
    made, logs = run(folder, "loss", loss_type="plain_gap", beta=0.2)
    assert len(logs) == 2 and made.args.loss_type == "plain_gap"
    for log in logs:
        assert log["loss"] == pytest.approx(0.2 * (0.25 * log["logps/chosen"] - log["logps/rejected"]), rel=1e-4)

    also = trainer(tmp_path, loss_type=["plain_gap", "sft"], loss_weights=[1.0, 1e-6], beta=0.2)
    also.train()
    log = next(log for log in also.state.log_history if "prompts" in log)
    assert log["loss"] == pytest.approx(0.2 * (0.25 * log["logps/chosen"] - log["logps/rejected"]), rel=1e-3)


def test_a_strategy_and_a_metric(folder):
    _, logs = run(folder, "strategy", pair_selection="second_of_all")
    seen = [json.loads(line) for line in (folder / "picked.jsonl").read_text().splitlines()]
    assert len(seen) == len(logs) == 2
    for step, log in zip(seen, logs, strict=True):
        lowest = [sorted(values)[:2] for values in step["scores"]]
        picked = [(chosen, rejected) for chosen, rejected in step["pairs"]]
        assert picked and set(picked) <= {(second, first) for first, second in lowest}
        assert log["mine/margins"] == pytest.approx(log["objective/scores_margin"])
        assert log["mine/margins"] == pytest.approx(sum(a - b for a, b in picked) / len(picked))


def test_an_engine(folder):
    made, logs = run(folder, "engine", engine="fixed", num_completions=2)
    assert type(made.sampler.engine).__name__ == "Fixed" and made.sampler.engine.version == 1
    engine: Engine = made.sampler.engine
    assert engine.overlaps is False
    for log in logs:
        assert log["completions/mean_length"] == 2.5 and log["val/contain_eos_token"] == 1
        assert log["sampling/staleness"] == 0 and log["pairs/count"] == 8
        assert log["objective/scores"] == 1.5 and log["objective/scores_margin"] == 1
    assert made.args.engine_name == "fixed"


def test_a_method(folder):
    made, logs = run(folder, "method", method="thrice", temperature=0.5, xpo_alpha=0.125)
    assert logs[0]["loss"] == pytest.approx(3 * math.log(2) + 0.125, rel=1e-4)
    assert [log["pairs/count"] for log in logs] == [1, 1]
    assert made.method.name == made.args.method == "thrice"
    with pytest.raises(ValueError, match=r"^`method='thrice'` needs `temperature` 0.5\.$"):
        config(folder, method="thrice")


def test_a_reward_a_judge_and_metrics(folder, tmp_path):
    _, logs = run(folder, "scorers", reward_funcs=["counting"], num_completions=4)
    assert [log["objective/scores"] for log in logs] == [1.5, 1.5]
    assert [log["objective/scores_margin"] for log in logs] == [3, 3]
    assert [(log["mine/made"], log["mine/some"]) for log in logs] == [(0, 3), (0, 3)]

    made, logs = run(folder, "scorers", judge="alphabet", num_completions=2)
    assert [log["mine/made"] for log in logs] == [1, 1] and made.judge.name == "Alphabet"
    made, logs = run(folder, "scorers", judge="even_odds", num_completions=2)
    assert [log["pairs/probability"] for log in logs] == pytest.approx([0.9, 0.9])

    made = trainer(tmp_path, reward_funcs="counting", num_completions=4)
    assert made.scorers[0].score([tiny.group(prompt, [[5, 1]] * 4) for prompt in tiny.prompts([3])]) == [[0, 1, 2, 3]]
    made = trainer(tmp_path, reward_funcs=None, kwargs={"judge": "even_odds", "eval_judge": "alphabet"})
    assert made.judge.name == "odds"


def test_gold_by_name_and_an_evaluation_with_a_plugin(folder, capsys, monkeypatch):
    _, logs = run(
        folder,
        "scorers",
        eval_reward_funcs=["counting"],
        eval_dataset_name="data.jsonl",
        eval_strategy="steps",
        eval_steps=2,
    )
    monkeypatch.chdir(folder)
    words = ["eval", "run.yaml", "--model", "policy", "--json", "result.json", "--max_new_tokens", "4"]
    assert main([*words, "--judge", "even_odds"]) == 0
    result = json.loads((folder / "result.json").read_text())
    assert result["scored_by"] == "odds" and result["win_rate"]["value"] == 0.5
    assert main([*words, "--judge", "even_ods"]) == 2
    assert (
        "error: command line: `judge`: there is no judge named 'even_ods'. There is alphabet, even_odds. "
        "Did you mean `even_odds`?\n" in capsys.readouterr().err
    )


# --- what goes wrong --------------------------------------------------------------------------------------------------


def failing(folder, capsys, text=None, **fields):
    """The lines of a run that exits with 2 before a model is loaded."""
    if text is not None:
        (folder / "bad.py").write_text(text)
    settings = {"reward_funcs": "feedback.py:count_words", "plugins": ["bad.py"], **fields}
    path = write_run_file(folder, **{**settings, "model_name_or_path": "no/such-model"})
    assert main(["train", str(path)]) == 2
    numbered = {line.split(":")[0]: number for number, line in enumerate(path.read_text().splitlines(), 1)}
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return [line.removeprefix(f"error: {path}:") for line in lines], numbered


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, "`plugins` 'bad.py': there is no file {folder}/bad.py or bad.py."),
        ("def f(:\n", "`plugins` 'bad.py': `bad.py` is no valid Python: invalid syntax (bad.py, line 1)."),
        ("\nx = 1 / 0\n", "`plugins`: importing `bad.py` failed in line 2: ZeroDivisionError: division by zero"),
        (
            "import no_such_package\n",
            "`plugins`: importing `bad.py` failed in line 1: ModuleNotFoundError: No module named 'no_such_package'",
        ),
    ],
    ids=["no file", "no Python", "raises", "needs a package"],
)
def test_plugins_that_cannot_be_imported(folder, capsys, text, wanted):
    lines, numbered = failing(folder, capsys, text)
    assert lines == [f"{numbered['plugins']}:" + " " + wanted.format(folder=folder)]


@pytest.mark.parametrize("kind", ["loss", "strategy", "method", "engine", "reward", "judge", "metric"])
def test_a_name_that_is_taken(folder, capsys, kind):
    homes = {
        "loss": ("objective.losses", "sigmoid"),
        "strategy": ("pairing.strategies", "best_worst"),
        "method": ("methods.base", "xpo"),
        "engine": ("rollout.registry", "vllm_server"),
    }
    module = {"reward": "scoring.registry", "judge": "scoring.judge_registry", "metric": "training.metric_registry"}
    home, name = homes.get(kind) or (module[kind], "mine")
    text = f"from online_dpo.{home} import {kind}\n\n@{kind}('mine')\nclass A: ...\n\n@{kind}({name!r})\nclass B: ...\n"
    lines, numbered = failing(folder, capsys, text)
    start = (
        f"{numbered['plugins']}: `plugins`: importing `bad.py` failed in line 6: RegistryError: a {kind} named `{name}`"
    )
    assert len(lines) == 1 and lines[0].startswith(f"{start} is there already, registered at "), lines
    file = "bad.py:3" if name == "mine" else "xpo.py" if kind == "method" else f"{home.split('.')[-1]}.py"
    assert f"{file}" in lines[0] and lines[0].endswith(". Take another name.")


def test_names_that_nothing_has(folder, capsys):
    text = LOSS + STRATEGY + ENGINE + METHOD + SCORERS
    fields = dict(loss_type=["sigmoid", "plain_gp"], pair_selection="second", method="thrise", engine="fixd")
    lines, at = failing(folder, capsys, text, **fields, reward_funcs=["countin"], eval_judge="alphabets")
    assert lines == [
        f"{at['engine']}: `engine` is 'fixd'; wanted: one of transformers, vllm_colocate, vllm_server, fixed or null. "
        "Did you mean `fixed`?",
        f"{at['loss_type']}: `loss_type` is ['sigmoid', 'plain_gp']; wanted: one of sigmoid, ipo, hinge, robust, "
        "exo_pair, simpo, sft, apo_zero, apo_down, dpop, plain_gap or a list of these. Did you mean `plain_gap`?",
        f"{at['method']}: `method` is 'thrise'; wanted: one of online_dpo, xpo, nash_md, thrice. "
        "Did you mean `thrice`?",
        f"{at['pair_selection']}: `pair_selection` is 'second'; wanted: one of best_worst, best_random, "
        "best_mean_minus_two_sigma, all_pairs, widest_allowed, second_of_all. Did you mean `second_of_all`?",
        f"{at['reward_funcs']}: `reward_funcs`: there is no reward named 'countin'. There is counting. "
        "Did you mean `counting`?",
        f"{at['eval_judge']}: `eval_judge`: there is no judge named 'alphabets'. There is alphabet, even_odds. "
        "Did you mean `alphabet`?",
    ]


def test_without_plugins_names_are_checked_before_anything_is_imported(folder, capsys):
    imported(folder / "my_loss.py")
    lines, at = failing(folder, capsys, plugins=None, loss_type="plain_gap", reward_funcs=["counting"], judge="odds")
    assert [line.split(":")[0] for line in lines] == [str(at[name]) for name in ("loss_type", "reward_funcs", "judge")]
    assert "wanted: one of sigmoid, ipo" in lines[0] and "wanted: `file.py:function`" in lines[1]


def test_python_knows_a_name_once_it_is_registered(folder):
    with pytest.raises(ValueError, match=r"`loss_type` must be one of .*, dpop; it is 'plain_gap'\."):
        config(folder, loss_type="plain_gap")
    imported(folder / "my_loss.py")
    assert config(folder, loss_type="plain_gap").loss_types == ["plain_gap"]
    with pytest.raises(ValueError, match=r"dpop, plain_gap; it is 'plain_gp'\. Did you mean `plain_gap`\?"):
        config(folder, loss_type="plain_gp")
    imported(folder / "my_scorers.py")
    for fields, message in (
        (
            dict(reward_funcs="countig"),
            "there is no reward named 'countig'. There is counting. Did you mean `counting`?",
        ),
        (
            dict(reward_funcs=None, kwargs={"judge": "alphabt"}),
            "There is alphabet, even_odds. Did you mean `alphabet`?",
        ),
    ):
        with pytest.raises(ValueError) as found:
            trainer(folder, **fields)
        assert message in str(found.value)


def test_engines_and_the_fields_of_vllm_say_the_same(tmp_path):
    made = config(tmp_path, engine="vllm_server")
    assert (made.use_vllm, made.vllm_mode, made.engine_name) == (True, "server", "vllm_server")
    made = config(tmp_path, engine="vllm_colocate", use_vllm=True)
    assert (made.use_vllm, made.vllm_mode) == (True, "colocate")
    assert config(tmp_path, use_vllm=True, vllm_mode="server").engine_name == "vllm_server"
    assert config(tmp_path).engine_name == config(tmp_path, engine="transformers").engine_name == "transformers"
    with pytest.raises(ValueError, match="`engine='vllm_colocate'` contradicts `vllm_mode='server'`"):
        config(tmp_path, engine="vllm_colocate", vllm_mode="server")
    with pytest.raises(ValueError, match="`engine='transformers'` contradicts `use_vllm`"):
        config(tmp_path, engine="transformers", use_vllm=True)
    with pytest.raises(ValueError, match=r"one of transformers, vllm_colocate, vllm_server; it is 'vlm_server'\. Did"):
        config(tmp_path, engine="vlm_server")


@pytest.mark.parametrize("returned", [None, "three", ["a"], [None]], ids=repr)
def test_a_metric_that_is_no_number_ends_the_run(tmp_path, returned):
    @metric("mine/bad")
    def bad(feedback, pairing):
        return returned

    with pytest.raises(Exception, match=r"Metric `mine/bad` raised (TypeError|ValueError): .*\(step 0\)"):
        trainer(tmp_path).train()


def test_metrics_are_means_over_all_numbers(tmp_path):
    numbers = iter([[1.0, 2.0], math.inf, 6])

    @metric("mine/number")
    def number(feedback, pairing):
        return next(numbers)

    store = MetricStore()
    for step in range(3):
        record_registered(store, None, None, step)
    assert store.drain() == {"mine/number": 3.0} and list(METRICS) == ["mine/number"]
