"""Scorers from what users pass as rewards, and what is refused before anything is loaded."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from online_dpo.config.trainer_config import OnlineDPOConfig
from online_dpo.scoring.registry import build_scorers, check_scorers
from online_dpo.scoring.rewards.combine import score_groups
from online_dpo.scoring.rewards.model import RewardModelScorer
from support.fixed_scores import Says, group

GROUPS = [group("p", "a", "b"), group("q", "c", "d")]


def config(tmp_path, **options) -> OnlineDPOConfig:
    return OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "p": 2, "q": 3, "a": 4, "b": 5}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def reward_model(labels: int = 1) -> LlamaForSequenceClassification:
    torch.manual_seed(1)
    sizes = {"vocab_size": 6, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForSequenceClassification(
        LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, num_labels=labels)
    ).eval()


@pytest.fixture
def folder(tmp_path) -> str:
    reward_model().save_pretrained(tmp_path / "rm")
    tokenizer().save_pretrained(tmp_path / "rm")
    return str(tmp_path / "rm")


def length(completions, trainer_state=None):
    return [float(len(text)) for text in completions]


def test_kinds_and_order(tmp_path, folder):
    model = reward_model()
    own = Says("own", [1, 2])
    rewards = [length, folder, own, model]
    tok = tokenizer()
    scorers = build_scorers(rewards, [None, None, None, tok], config(tmp_path, reward_batch_size=3), state=None)
    assert [scorer.name for scorer in scorers] == ["length", "rm", "own", "LlamaForSequenceClassification"]
    loaded, given = scorers[1], scorers[3]
    assert isinstance(loaded, RewardModelScorer) and isinstance(given, RewardModelScorer)
    assert loaded.batch_size == given.batch_size == 3 and given.model is model and given.tokenizer is tok
    asked = [group("p", "a", "bab")]
    with torch.no_grad():
        truth = [model(torch.tensor([ids])).logits.item() for ids in ([2, 4, 1], [2, 5, 4, 5, 1])]
    for scorer in (loaded, given):
        assert scorer.score(asked)[0] == pytest.approx(truth, abs=1e-6)
    values = score_groups(asked, scorers).values[0]
    assert values == pytest.approx([1 + 1 + 2 * truth[0], 3 + 2 + 2 * truth[1]], abs=1e-5)


def test_one_reward_without_a_list(tmp_path, folder):
    [scorer] = build_scorers(folder, tokenizer(), config(tmp_path), state=None)
    assert scorer.name == "rm"
    [scorer] = build_scorers(length, None, config(tmp_path), state=None)
    assert scorer.score(GROUPS) == [[1.0, 1.0], [1.0, 1.0]]


def test_functions_receive_the_trainer_state(tmp_path):
    state = SimpleNamespace(global_step=5)

    def step(completions, trainer_state):
        return [trainer_state.global_step for _ in completions]

    [scorer] = build_scorers([step], None, config(tmp_path), state=lambda: state)
    assert scorer.score(GROUPS[:1]) == [[5.0, 5.0]]
    state.global_step = 6
    assert scorer.score(GROUPS[:1]) == [[6.0, 6.0]]


def test_the_same_reward_twice_is_loaded_once(tmp_path, folder):
    scorers = build_scorers([folder, length, folder, length], None, config(tmp_path), state=None)
    assert scorers[0] is scorers[2] and scorers[1] is scorers[3] and scorers[0] is not scorers[1]


def test_placed_models_are_not_moved(tmp_path):
    class Placed(LlamaForSequenceClassification):
        def to(self, *args, **kwargs):
            raise ValueError("this model was placed by its device map")

    placed, moved = Placed(reward_model().config), reward_model()
    placed.hf_device_map = {"": "cpu"}
    moved_to = []
    moved.to = lambda device: moved_to.append(device) or moved  # pyright: ignore
    args = config(tmp_path)
    build_scorers([placed, moved], [tokenizer(), tokenizer()], args, state=None)
    assert moved_to == [args.device]


@pytest.mark.parametrize(
    ("rewards", "tokenizers", "options", "error", "message"),
    [
        ([], None, {}, ValueError, "`reward_funcs` is empty"),
        ([length, 3], None, {}, TypeError, "Each of `reward_funcs` must be .*; one is int 3"),
        (None, None, {}, TypeError, "one is None"),
        (nn.Linear(2, 1), None, {}, TypeError, "Linear has no `config`"),
        (reward_model(labels=2), None, {}, ValueError, "one label.*it has 2"),
        (reward_model(), None, {}, ValueError, "its tokenizer is unknown. Pass it in `reward_processing_classes`"),
        ([length, length], [None], {}, ValueError, "has 1 entries, but there are 2 reward functions"),
        ([length, length], tokenizer(), {}, ValueError, "has 1 entries, but there are 2 reward functions"),
        (length, "gpt2", {}, TypeError, "must be a tokenizer or None; one is str 'gpt2'"),
        (length, None, {"reward_weights": [1.0, 2.0]}, ValueError, "has 2 numbers, but there are 1 reward functions"),
        (length, None, {"reward_weights": [math.nan]}, ValueError, "must be a finite number"),
        (
            [length, length],
            None,
            {"reward_normalization": ["group", "none", "group"]},
            ValueError,
            "has 3 entries, but there are 2 reward",
        ),
        ("./no/model", None, {}, ValueError, "`./no/model` does not exist"),
        ("/no-model", None, {}, ValueError, "`/no-model` does not exist"),
        ("~/no-model-here", None, {}, ValueError, "`~/no-model-here` does not exist"),
        ("out/run/reward", None, {}, ValueError, "`out/run/reward` does not exist"),
        ("", None, {}, ValueError, "`` does not exist"),
    ],
)
def test_refused_before_anything_is_loaded(tmp_path, rewards, tokenizers, options, error, message):
    for check in (check_scorers, lambda *a: build_scorers(*a, state=None)):
        with pytest.raises(error, match=message):
            check(rewards, tokenizers, config(tmp_path, **options))


def test_paths_that_check_accepts_and_refuses(tmp_path, folder):
    args = config(tmp_path)
    check_scorers(["org/model-on-the-hub", "model-on-the-hub", folder], None, args)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    check_scorers(str(tmp_path / "adapter"), None, args)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "rm" / "config.json"):
        with pytest.raises(
            ValueError, match="is no model folder: it holds neither config.json nor adapter_config.json"
        ):
            check_scorers(str(path), None, args)


def test_a_tokenizer_for_a_function_is_ignored_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="processing class given for `length` is ignored"):
        build_scorers([length], [tokenizer()], config(tmp_path), state=None)
