"""Names that others chose show in the model card as they are: they are neither mark-up, nor HTML, nor its head."""

import json
import re
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import TrainerState

from online_dpo import OnlineDPOConfig
from online_dpo.runs.report.text import plain_text
from online_dpo.training.model_card import write_model_card
from support import records, tiny

HOSTILE = [
    "x<script>alert(1)</script>",
    "a\n---\nlicense: evil\n---\n# other",
    "[click](javascript:alert(1))",
    "![](http://127.0.0.1/x.png)",
    "one | two | three",
    "`code` ```\n<b>",
    "*bold* _it_ ~gone~ $x$ \\| \x1b[31m\u202e",
    "--- ",
    "y" * 5000,
]


def write_card(folder, source="org/model", log_history=(), run_folder=False, **options):
    args = OnlineDPOConfig(output_dir=str(folder), use_cpu=True, report_to=[], run_folder=run_folder)
    policy = tiny.causal_lm()
    policy.config._name_or_path = source
    state = TrainerState(log_history=list(log_history))
    given = {"name": None, "reference": "none", "feedback": "words", "num_processes": 1, **options}
    write_model_card(args, state, policy, **given)
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_name_changes_nothing_but_its_own_place(tmp_path, text):
    plain, card = (
        write_card(tmp_path / place, name=name, reference=name, feedback=name, tags=[name], datasets=[name])
        for place, name in (("plain", "word"), ("hostile", text))
    )
    head = yaml.safe_load(card.split("\n---\n")[0])
    assert head["datasets"] == [text] and head["tags"][-1] == text and "license" not in head
    shape = [re.sub(r"(?<!\\)[^|#`\n]", "", line) for line in card_body(plain).split("\n")]
    assert [re.sub(r"\\.|[^|#`\n]", "", line) for line in card_body(card).split("\n")] == shape
    assert not re.search(r"<(script|b)|(?<!\\)\]\(|(?<!\\)!\[|\x1b|\u202e", card_body(card).replace(LINK, ""))
    assert ModelCard.load(tmp_path / "hostile/README.md").data.to_dict() == head
    assert len(card_body(card)) < 5000


LINK = "[Guo et al. 2024](https://huggingface.co/papers/2402.04792)"


def card_body(card):
    return card.split("\n---\n", 1)[1]


@pytest.mark.parametrize("source", ["x<script>", "/no/such/folder", "a b", "", "../up"])
def test_what_is_no_name_of_the_hub_is_not_given_as_the_base_model(tmp_path, source):
    card = write_card(tmp_path, source)
    assert "base_model" not in yaml.safe_load(card.split("\n---\n")[0])
    assert "<script" not in card


def test_a_name_of_the_hub_is_the_base_model(tmp_path):
    assert yaml.safe_load(write_card(tmp_path).split("\n---\n")[0])["base_model"] == "org/model"


def test_measurements_of_a_hostile_checkpoint_that_are_no_numbers_are_left_out(tmp_path):
    logs = [{"loss": 0.5, "step": 3}, {"loss": "<b>", "step": 4}, {"loss": 0.25, "step": "|x"}, {"step": 5}]
    assert "| `loss` | 0.5 | 3 |" in write_card(tmp_path, log_history=logs)


def test_settings_are_json_without_html(tmp_path):
    args = OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    args.judge_top = "</code><script>```"  # type: ignore[assignment]
    policy = tiny.causal_lm()
    write_model_card(args, TrainerState(), policy, name=None, reference="", feedback="", num_processes=1)
    card = (tmp_path / "README.md").read_text()
    settings = card.split("```json\n")[1].split("\n```\n")[0]
    assert json.loads(settings)["judge_top"] == args.judge_top
    assert "<" not in settings and "`" not in settings


def test_a_usual_name_is_as_it_is():
    for name in ("reward_length.v2", "http://host:80/score", "org/model-7B (llama)", "feedback.py:words, other"):
        assert plain_text(name) == name


def test_the_course_of_a_run_that_has_a_record_is_in_its_card(tmp_path):
    rows = [
        {
            "step": step,
            "kind": "train",
            "objective/scores": step / 2,
            "objective/kl": 0.5,
            "prompts": 4,
            "pairs/count": 3,
        }
        | {"dropped/tie": 1}
        for step in (1, 2)
    ]
    events = [
        {"step": 2, "kind": "skip", "message": "Skipped: see /home/me."},
        {"step": 2, "kind": "checkpoint"},
    ]
    events.append({"step": 1, "kind": "a|b <b>"})
    records.write(tmp_path, metrics=rows, events=events)
    assert "Course" not in write_card(tmp_path) and not (tmp_path / "training.svg").exists()
    card = write_card(tmp_path, run_folder=True)
    assert "![Reward and KL to the reference over the steps](training.svg)" in card
    assert "6 pairs were trained on; 2 of 8 prompts gave none." in card
    assert "| tie | all scores are equal, or the judge has no preference | 2 |" in card
    assert "| skip | 1 | 2 | 2 |" in card and "checkpoint" not in card and "/home" not in card
    assert r"| a\|b &lt;b&gt; | 1 | 1 | 1 |" in card
    picture = ElementTree.parse(tmp_path / "training.svg")
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Reward", "KL to the reference", "optimizer step"} <= set(texts)


def test_a_record_without_metrics_leaves_the_card_as_it_is(tmp_path):
    records.write(tmp_path / "with", events=[{"step": 0, "kind": "start", "message": "The run starts."}])
    assert "Course" not in write_card(tmp_path / "with", run_folder=True)
