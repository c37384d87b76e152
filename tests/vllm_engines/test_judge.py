"""A language model as judge, behind a real vLLM server that knows nothing of us."""

import threading

import pytest
import torch
from transformers import TrainerCallback

from online_dpo.errors import FeedbackStopped
from online_dpo.scoring.judges.llm import client
from online_dpo.scoring.judges.llm.judge import LLMJudge
from online_dpo.scoring.judges.llm.prompts import GENERAL_RUBRIC, TEMPLATE_TEXTS, Template
from support import vllm_judge
from support.endpoint import comparison
from support.training import trainer

COMPARISONS = [
    comparison(a, b) for a, b in (("w1 w2", "w3 w4"), ("w5", "w6 w7 w8"), ("w9 w9", "w10"), ("é", "<<<"), ("", "w11"))
]
STANDS = 300  # seconds until a server is up, at most


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    """A server on one machine is soon back."""
    monkeypatch.setattr(client, "LONGEST_PAUSE", 2.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    process = vllm_judge.JudgeServer(tmp_path_factory.mktemp("judge"))
    yield process
    process.kill()


def judge_of(server, **settings):
    """Patient: the server may be starting."""
    settings = {"max_tokens": 1, "attempts": 1000, "question_timeout": STANDS, "cache": None, **settings}
    return LLMJudge(model=vllm_judge.NAME, base_url=f"{server.url}/v1", **settings)


def chance_of_a(model, first, second):
    """The share of A in the model's distribution behind the question, and the question's length in tokens."""
    tokenizer = vllm_judge.tokenizer()
    question = Template("", TEMPLATE_TEXTS["direct"], 1).fill(GENERAL_RUBRIC, "Say something.", first, second)
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        probabilities = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
    a, b = probabilities[tokenizer.convert_tokens_to_ids(["A", "B"])].tolist()
    return a / (a + b), len(ids)


@pytest.fixture(scope="module")
def expected():
    """For each comparison the chance of A in the given order and in the other one; and all tokens of the questions."""
    model, chances, tokens = vllm_judge.model(), [], 0
    for one in COMPARISONS:
        texts = [completion.text for completion in one.completions]
        (given, some), (turned, others) = chance_of_a(model, *texts), chance_of_a(model, *reversed(texts))
        chances.append((given, turned))
        tokens += some + others
    assert max(max(pair) for pair in chances) > 0.6 and min(min(pair) for pair in chances) < 0.4
    return chances, tokens


def test_preferences_are_the_models_own(server, expected):
    chances, tokens = expected
    judge = judge_of(server)
    assert judge.prefer(COMPARISONS) == pytest.approx([(given + 1 - turned) / 2 for given, turned in chances], abs=1e-4)
    metrics = judge.metrics()
    assert metrics["judge/requests"] >= 10 and metrics["judge/failed"] == metrics["judge/unparsable"] == 0
    assert (metrics["judge/input_tokens"], metrics["judge/output_tokens"]) == (tokens, 10)
    assert metrics["judge/position_bias"] == pytest.approx(sum(map(sum, chances)) / 10, abs=1e-4)
    preferences = judge_of(server, order="given").prefer(COMPARISONS)
    assert preferences == pytest.approx([given for given, _ in chances], abs=1e-4)


def test_a_grammar_holds_it_to_one_letter(server, expected):
    """Without one, and with room for more, this model says letter after letter."""
    chances, _ = expected
    loose = judge_of(server, max_tokens=8, max_failure_share=1.0)
    assert loose.prefer(COMPARISONS) == [None] * 5 and loose.metrics()["judge/unparsable"] == 10
    held = judge_of(server, max_tokens=8, extra={"structured_outputs": {"choice": ["A", "B"]}})
    assert held.prefer(COMPARISONS) == pytest.approx([(given + 1 - turned) / 2 for given, turned in chances], abs=1e-4)


def test_votes_approach_the_probability(server, expected):
    given, turned = expected[0][0]
    votes = 200
    judge = judge_of(server, logprobs=False, votes=votes, vote_temperature=1.0)
    [preference] = judge.prefer(COMPARISONS[:1])
    error = (given * (1 - given) / votes + turned * (1 - turned) / votes) ** 0.5 / 2
    assert error > 0.01 and abs(preference - (given + 1 - turned) / 2) < 4.5 * error
    assert judge.metrics()["judge/requests"] == 2 * votes


def test_what_the_server_does_not_take(server):
    judge = judge_of(server, max_failure_share=1.0)
    assert judge.prefer([comparison("w1 " * 800, "w2")]) == [None]
    assert judge.metrics()["judge/failed"] == 2 and "context length" in judge.last_failure
    with pytest.raises(FeedbackStopped, match="nobody"):
        LLMJudge(model="nobody", base_url=f"{server.url}/v1", cache=None).prefer(COMPARISONS)


@pytest.mark.slow
def test_a_run_outlives_its_judges_server(server, tmp_path):
    """The server is killed after the second step and comes back: the run waits, and ends as without that."""

    class Restart(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                server.kill()
                threading.Timer(2.0, server.start).start()

    def run(name, callbacks):
        judge = judge_of(server, cache=str(tmp_path / f"{name}.sqlite3"))
        fields = dict(reward_funcs=None, max_steps=4, num_completions=3, logging_steps=4)
        made = trainer(tmp_path / name, kwargs={"judge": judge, "callbacks": callbacks}, **fields)
        made.train()
        [log] = [entry for entry in made.state.log_history if "pairs/count" in entry]
        assert log["judge/failed"] == 0 and log["pairs/count"] > 8
        return made.model, log

    whole, undisturbed = run("whole", [])
    through, log = run("through", [Restart()])
    assert log["judge/requests"] > undisturbed["judge/requests"]  # those that nobody took are among them
    assert log["judge/input_tokens"] == undisturbed["judge/input_tokens"]
    for ours, theirs in zip(through.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
