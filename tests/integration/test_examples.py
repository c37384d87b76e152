"""The scripts of examples/, as they are, with a start that knows next to nothing. That of vLLM: tests/vllm_engines."""

import importlib.util
from pathlib import Path

import pytest

from online_dpo.quickstart.artifacts import build
from online_dpo.quickstart.models import TINY
from support.endpoint import says, serving, shown

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A folder in which `online-dpo quickstart` has been, as the scripts want it."""
    folder = tmp_path_factory.mktemp("examples")
    build(folder / "runs/quickstart/start", size=TINY)
    return folder


@pytest.fixture(autouse=True)
def there(quickstart, tmp_path, monkeypatch):
    monkeypatch.chdir(quickstart)
    monkeypatch.setenv("HOME", str(tmp_path))  # for the judge's cache
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def last_log(history):
    [*_, log] = [log for log in history if "pairs/count" in log]
    assert log["step"] == 5 and log["loss"] > 0
    return log


def test_the_reward_functions_are_weighted(quickstart):
    log = last_log(example("reward_function").main(["--steps", "5"]))
    both = log["scores/right"] + 0.02 * log["scores/short"]
    assert log["objective/scores"] == pytest.approx(both, abs=2e-3)  # of completions that are not empty
    assert (quickstart / "runs/reward_function/metrics.jsonl").is_file()


def test_the_function_judges():
    judge = example("judge")
    assert judge.polite_and_short("", "Good question!", "No.") == 0.9
    assert judge.polite_and_short("", "one two three", "one") == 2 / 6
    assert last_log(judge.main(["--steps", "5"]))["objective/kl"] != 0


def test_the_endpoint_judges():
    def prefers_the_shorter(body, number):
        first, second = map(len, shown(body))
        return says("A", 0.5 if first == second else 0.9 if first < second else 0.1)

    with serving(prefers_the_shorter) as endpoint:
        log = last_log(example("judge").main(["--steps", "5", "--url", endpoint.url, "--output", "runs/llm"]))
    assert log["judge/position_bias"] == pytest.approx(0.5, abs=1e-3)
    assert {seen.body["model"] for seen in endpoint.seen} == {"my-judge"}
    assert all("polite and short" in seen.body["messages"][0]["content"] for seen in endpoint.seen)


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda script: script.name)
def test_a_script_has_less_than_60_lines(script):
    assert len(script.read_text().splitlines()) < 60
