"""`online-dpo eval`: what it reports and writes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

from online_dpo.cli.evaluation.report import report
from online_dpo.rollout.builtin.engine import TransformersEngine
from online_dpo.rollout.params import RolloutKey, SamplingParams, Stream
from online_dpo.stats.intervals import wilson_interval
from support import tiny
from support.endpoint import says, serving, shown
from support.eval_folders import LENGTHS, SHORT, figures, run, save


def forced_model(word):
    """Whatever the prompt, it says this word and ends."""
    model = tiny.causal_lm(sharpness=1.0, tie_word_embeddings=False)
    start, end = tiny.tokenizer().convert_tokens_to_ids(word), tiny.EOS
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 1.0  # every token says `word` next
        model.model.embed_tokens.weight[start, 0] = 0.0
        model.model.embed_tokens.weight[start, 1] = 1.0  # after which comes the end
        model.lm_head.weight.zero_()
        model.lm_head.weight[start, 0] = 50.0
        model.lm_head.weight[end, 1] = 50.0
    return model


def test_a_model_against_itself_is_even_in_every_comparison(folder, capsys):
    result, _ = figures(
        capsys,
        *("--model", "policy", "--against", "policy", "--prompts", "prompts.jsonl", "--reward", "rewards.py:words"),
        *(*SHORT, "--samples", 2),
    )
    assert (result["wins"], result["ties"], result["losses"], result["duels"]) == (0, 32, 0, 32)
    assert result["win_rate"]["value"] == 0.5 and result["length_controlled_win_rate"]["value"] == 0.5
    assert result["score"]["difference"]["value"] == 0.0 and result["score"]["difference"]["high"] == 0.0
    assert result["kl"] == {"value": 0.0, "standard_error": 0.0}
    assert result["tokens"]["model"] == result["tokens"]["against"]


@pytest.mark.slow
def test_types_of_weights_are_no_difference_between_models(folder, capsys):
    """What was trained from a checkpoint in bf16 is saved in fp32, and compared with that checkpoint."""
    half = tiny.causal_lm(sharpness=1.0).bfloat16()
    save("before", half)
    save("after", half.float())
    get_peft_model(half, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("adapter")
    rewrite_base("adapter", "before")
    tiny.tokenizer().save_pretrained("adapter")
    for model, against in (("after", "before"), ("after", "adapter")):
        words = ("--model", model, "--against", against, "--prompts", "prompts.jsonl", "--reward", "rewards.py:words")
        result, _ = figures(capsys, *words, *SHORT)
        assert result["kl"] == {"value": 0.0, "standard_error": 0.0} and result["ties"] == result["duels"]


def rewrite_base(adapter, base):
    path = Path(adapter) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


@pytest.mark.smoke
def test_the_better_model_wins_and_everything_printed_stands_in_the_json(folder, capsys):
    save("good", forced_model("w7"))
    save("bad", forced_model("w8"))
    words = ("--model", "good", "--against", "bad", "--prompts", "prompts.jsonl", "--reward", "rewards.py:forced")
    result, printed = figures(capsys, *words, *SHORT, "--output", "answers.jsonl", "--kl", "false")
    assert (result["wins"], result["ties"], result["losses"]) == (16, 0, 0)
    low, high = wilson_interval(1.0, 16)
    assert result["win_rate"] == {"value": 1.0, "low": low, "high": high, "interval": "wilson"}
    assert result["score"]["model"]["value"] == 1.0 and result["score"]["against"]["value"] == 0.0
    assert result["ended"] == {"model": 1.0, "against": 1.0} and result["tokens"] == {"model": 2.0, "against": 2.0}
    assert result["kl"] is None and result["scored_by"] == "forced"
    assert f"Win rate 100.0%, 95 % interval {low:.1%} to {high:.1%} (wilson)" in printed.out
    assert "Wins 16, ties 0, losses 0 of 16" in printed.out and "KL" not in printed.out
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and rows[3]["row"] == 3 and rows[3]["prompt"] == tiny.prompts(LENGTHS)[3].content
    assert rows[3]["model"] == {"text": " w7", "tokens": 2, "ended": True, "score": 1.0}
    assert rows[3]["against"] == {"text": " w8", "tokens": 2, "ended": True, "score": 0.0}
    assert {row["preference"] for row in rows} == {1.0}
    turned, _ = figures(capsys, "--model", "bad", "--against", "good", *words[4:], *SHORT)
    assert turned["losses"] == 16 and turned["win_rate"]["value"] == 0.0


def test_the_table_shows_the_figures_of_the_json(folder, capsys):
    result, printed = figures(
        capsys,
        *("--model", "policy", "--against", "other", "--prompts", "prompts.jsonl", "--reward", "rewards.py:words"),
        *(*SHORT, "--samples", 3),
    )
    cells = {
        parts[1].strip(): [part.strip() for part in parts[2:4]]
        for line in printed.out.splitlines()
        if len(parts := re.split("[│┃]", line)) == 5
    }
    assert cells["tokens"] == [f"{result['tokens'][side]:.4g}" for side in ("model", "against")]
    assert cells["ended by themselves"] == [f"{result['ended'][side]:.1%}" for side in ("model", "against")]
    assert cells["scores missing"] == ["0", "0"]
    for place, side in enumerate(("model", "against")):
        one = result["score"][side]
        assert cells["score"][place] == f"{one['value']:.4g} ({one['low']:.4g} to {one['high']:.4g})"
    rate, kl = result["win_rate"], result["kl"]
    assert rate["interval"] == "bootstrap" and result["duels"] == 48
    assert f"Win rate {rate['value']:.1%}, 95 % interval {rate['low']:.1%} to {rate['high']:.1%} (boot" in printed.out
    assert f"KL {kl['value']:.4g} nats, standard error {kl['standard_error']:.4g}" in printed.out


def test_both_models_answer_with_the_same_random_numbers_and_the_kl_is_that_of_plain_samples(folder, capsys):
    """Against the engine and the models themselves; the temperature is not 1, so the KL has samples of its own."""
    result, _ = figures(
        capsys,
        *("--model", "policy", "--against", "other", "--prompts", "prompts.jsonl", "--reward", "rewards.py:words"),
        *(*SHORT, "--seed", 7, "--temperature", 0.5, "--output", "answers.jsonl"),
    )
    prompts, key = tiny.prompts(LENGTHS), RolloutKey(7, 0, Stream.ANSWERS)
    models = {name: tiny.causal_lm(seed=seed, sharpness=1.0) for name, seed in (("model", 0), ("against", 5))}
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    for side, model in models.items():
        engine = TransformersEngine(model, tiny.tokenizer())
        groups = engine.generate(prompts, 1, SamplingParams(8, (tiny.EOS,), temperature=0.5), key)
        assert [row[side]["text"] for row in rows] == [group.completions[0].text for group in groups]
    plain = TransformersEngine(models["model"], tiny.tokenizer()).generate(
        prompts, 1, SamplingParams(8, (tiny.EOS,)), RolloutKey(7, 0, Stream.FOR_KL)
    )
    ratios = []
    for group in plain:
        ids = torch.tensor([[*group.prompt.token_ids, *group.completions[0].token_ids]])
        at = len(group.prompt.token_ids)
        with torch.no_grad():
            logps = [model(ids).logits[0, at - 1 : -1].log_softmax(-1) for model in models.values()]
        own, others = (x.gather(-1, ids[0, at:, None]).sum().item() for x in logps)
        ratios.append(own - others)
    assert result["kl"]["value"] == pytest.approx(sum(ratios) / 16, abs=1e-4)
    assert result["kl"]["standard_error"] == pytest.approx(torch.tensor(ratios).std().item() / 4, abs=1e-4)


def test_greedy_answers_are_the_most_probable_tokens(folder, capsys):
    words = ("--model", "policy", "--against", "other", "--prompts", "prompts.jsonl", "--reward", "rewards.py:words")
    result, _ = figures(capsys, *words, *SHORT, "--greedy", "--limit", 2, "--output", "answers.jsonl")
    assert result["prompts"] == 2 and result["temperature"] is None and result["kl"]["value"] is not None
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    prompt = tiny.prompts(LENGTHS)[0]
    made = tiny.causal_lm(sharpness=1.0).generate(
        torch.tensor([prompt.token_ids]), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=tiny.EOS
    )[0, len(prompt.token_ids) :]
    assert rows[0]["model"]["text"] == " " + tiny.tokenizer().decode(made, skip_special_tokens=True)


def test_columns_reach_the_reward_as_they_stand_in_the_file(folder, capsys):
    Path("x.csv").write_text("prompt,id,n,day\nw1 w2,007,18,NA\nw3 w4,1e5,,2024-01-31\n")
    words = ("--model", "policy", "--against", "other", "--prompts", "x.csv", "--reward", "rewards.py:note", *SHORT)
    figures(capsys, *words, "--kl", "false", "--dataset_types", "{n: int64}")
    rows = [{"id": "007", "day": "NA", "n": 18}, {"id": "1e5", "day": "2024-01-31", "n": None}]
    assert set(Path("seen.txt").read_text().splitlines()) == {repr(row) for row in rows}
    assert run(*words, "--dataset_types", "{m: int64}") == 2
    assert "x.csv has no column m, for which a type is given" in capsys.readouterr().err


def test_missing_scores_are_counted(folder, capsys):
    """The scorer does not apply to the first prompt, nor to others that begin with the same word."""
    first = [prompt.content.split()[0] for prompt in tiny.prompts(LENGTHS)]
    missing = first.count(first[0])
    result, printed = figures(
        capsys,
        *("--model", "policy", "--against", "policy", "--prompts", "prompts.jsonl", "--reward", "rewards.py:partly"),
        *SHORT,
    )
    assert result["undecidable"] == missing and result["ties"] == 16 - missing
    assert result["score"]["model"]["missing"] == missing
    assert f"undecidable {missing} of 16" in printed.out


def longest_wins(body, number):
    first, second = shown(body)
    return says("A", 0.5 if len(first) == len(second) else 0.9 if len(first) > len(second) else 0.1)


def test_a_language_model_judges_in_both_orders(folder, capsys):
    with serving(longest_wins) as endpoint:
        kwargs = json.dumps({"model": "m", "base_url": endpoint.url, "cache": None})
        result, printed = figures(
            capsys,
            *("--model", "policy", "--against", "other", "--prompts", "prompts.jsonl", "--judge", "llm"),
            *("--judge_kwargs", kwargs, "--output", "answers.jsonl", *SHORT),
        )
        asked = len(endpoint.seen)
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    differ = [row for row in rows if row["model"]["text"] != row["against"]["text"]]
    assert asked == 2 * len(differ) > 0
    for row in differ:
        longer = len(row["model"]["text"]) - len(row["against"]["text"])
        assert row["preference"] == pytest.approx(0.5 if longer == 0 else 0.9 if longer > 0 else 0.1)
    assert result["win_rate"]["interval"] == "bootstrap" and result["score"] is None and result["scored_by"] == "m"
    assert "score" not in printed.out.replace("scored by", "")


def test_a_judge_that_likes_a_place_is_even(folder, capsys):
    result, _ = figures(
        capsys,
        *("--model", "policy", "--against", "other", "--prompts", "prompts.jsonl", "--judge", "rewards.py:second"),
        *SHORT,
    )
    assert result["ties"] == 16 and result["win_rate"]["value"] == 0.5


def test_names_of_models_and_scorers_are_no_mark_up_of_the_terminal():
    output = io.StringIO()
    share = {"value": 0.5, "low": 0.0, "high": 1.0, "interval": "Wilson"}
    both = {"model": 1.0, "against": 1.0}
    report(
        Console(file=output, width=200),
        {
            "prompts": 2,
            "scored_by": "[/b][red]r\x1b[31m",
            "model": "out[v2]",
            "against": "[/x]",
            "score": None,
            **{name: both for name in ("tokens", "characters", "ended")},
            **{"wins": 1, "ties": 0, "losses": 1, "undecidable": 0, "duels": 2},
            "win_rate": share,
            "length_controlled_win_rate": None,
            "kl": None,
        },
    )
    assert all(name in output.getvalue() for name in ("[/b][red]r", "out[v2]", "[/x]"))
    assert "\x1b" not in output.getvalue()
