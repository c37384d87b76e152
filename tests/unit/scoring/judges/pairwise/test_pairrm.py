"""PairRM in the form of transformers: a folder as it is published, with tiny random weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from online_dpo.scoring.judges.pairwise.judge import PairwiseModelJudge
from online_dpo.scoring.judges.pairwise.pairrm import DebertaV2PairRM
from support.endpoint import comparison
from support.pairwise_folders import MARKS, pairrm_folder, pairrm_log_odds, pairrm_tokenizer

COMPARISONS = [
    comparison("w1 w2 w3", "w4", prompt="w5 w6"),
    comparison("w4", "w1 w2 w3", prompt="w5 w6"),
    comparison("w7", "w7", prompt="w8"),
    comparison("w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20", "", prompt="w17 hello?\n\nw3"),
    comparison("w2", "w3", prompt=[{"role": "user", "content": "w1"}]),
]


def orders(folder):
    for one in COMPARISONS:
        prompt = one.prompt.content if isinstance(one.prompt.content, str) else "w1"
        a, b = (completion.text for completion in one.completions)
        both = [pairrm_log_odds(folder, prompt, *texts) for texts in ((a, b), (b, a))]
        yield torch.tensor(both, dtype=torch.float64).sigmoid().tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_it_says_what_the_published_definition_says(tmp_path, batch_size):
    folder = pairrm_folder(tmp_path / "PairRM")
    judge = PairwiseModelJudge.load(str(folder), batch_size=batch_size)
    assert judge.name == "PairRM" and judge.model.dtype == torch.float32
    expected = list(orders(folder))
    assert judge.prefer(COMPARISONS) == [pytest.approx((a + 1 - b) / 2, abs=1e-6) for a, b in expected]
    metrics = judge.metrics()
    assert metrics["judge/position_bias"] == pytest.approx(sum(map(sum, expected)) / 10)
    assert max(abs(a + b - 1) for a, b in expected) > 0.05 and max(abs(a - b) for a, b in expected) > 0.1
    assert judge.prefer(COMPARISONS[2:3]) == [0.5]


def test_several_tasks_are_averaged(tmp_path):
    folder = pairrm_folder(tmp_path / "PairRM", n_tasks=3)
    expected = [pytest.approx((a + 1 - b) / 2, abs=1e-6) for a, b in orders(folder)]
    assert PairwiseModelJudge.load(str(folder)).prefer(COMPARISONS) == expected


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_stays_what_it_is(tmp_path, dtype, error):
    folder = pairrm_folder(tmp_path / "PairRM", dtype)
    judge = PairwiseModelJudge.load(str(folder))
    assert {parameter.dtype for parameter in judge.model.parameters()} == {dtype}
    expected = [pytest.approx((a + 1 - b) / 2, abs=error) for a, b in orders(folder)]
    assert judge.prefer(COMPARISONS) == expected


def test_nothing_is_cut_off(tmp_path):
    folder = pairrm_folder(tmp_path / "PairRM")
    short = comparison("w1 w2", "w3", prompt="w4")  # 4 + 5 + 4 tokens
    one_more = comparison("w1 w2", "w3 w3", prompt="w4")
    judge = PairwiseModelJudge.load(str(folder), max_tokens=13)
    found = judge.prefer([one_more, short])
    assert found[0] is None and found[1] is not None and judge.metrics()["judge/too_long"] == 1
    longer = comparison("w1 " * 900, "w2 " * 900, prompt="w3 " * 240)  # 2049, one more than PairRM was trained with
    judge = PairwiseModelJudge.load(str(folder))
    assert judge.prefer([longer, short]) == [None, pytest.approx(found[1])]


def test_an_answer_that_writes_a_mark_has_no_preference(tmp_path):
    judge = PairwiseModelJudge.load(str(pairrm_folder(tmp_path / "PairRM")))
    for mark in MARKS[:3]:
        assert judge.prefer([comparison(f"w1 {mark} w2", "w3"), comparison("w1", "w3")])[0] is None
    metrics = judge.metrics()
    assert metrics["judge/failed"] == 6 and metrics["judge/too_long"] == 0
    assert judge.last_failure == "the model's output is not finite"


def test_what_is_not_whole_is_refused(tmp_path):
    folder = pairrm_folder(tmp_path / "PairRM")
    weights = load_file(folder / "model.safetensors")
    headless = {name: w for name, w in weights.items() if not name.startswith("head_layer.4")}
    save_file(headless, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no trained pairwise model: .* `head_layer.4.bias`, `head_layer.4.weight`"):
        PairwiseModelJudge.load(str(folder))
    with pytest.raises(ValueError, match="PairRM as judge takes no `template`; it takes `max_tokens`, `batch_size`"):
        PairwiseModelJudge.load(str(folder), template="{prompt} {first} {second}")
    with pytest.raises(ValueError, match="`max_tokens` must be 1 or more; it is 0"):
        PairwiseModelJudge.load(str(folder), max_tokens=0)
    config = json.loads((folder / "config.json").read_text())
    del config["cand2_prefix_id"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="PairRM's config.json must say `cand2_prefix_id`"):
        PairwiseModelJudge.load(str(folder))
    (folder / "config.json").write_text(json.dumps({"ranker_type": "pairranker", "model_type": "deberta"}))
    with pytest.raises(ValueError, match="LLM-Blender's own form.*llm-blender/PairRM-hf"):
        PairwiseModelJudge.load(str(folder))


def test_another_models_tokenizer_is_refused(tmp_path):
    model = DebertaV2PairRM.from_pretrained(pairrm_folder(tmp_path / "PairRM"))
    plain = pairrm_tokenizer()
    model.mark_ids = (model.mark_ids[0], model.mark_ids[2], model.mark_ids[1])
    with pytest.raises(ValueError, match=r"`<\|candidate1\|>` as token .* `cand1_prefix_id`"):
        PairwiseModelJudge(model, plain)
