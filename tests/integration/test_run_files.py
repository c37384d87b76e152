"""Every loss and every way to pick pairs, from a run file as the command line reads it to a trained step."""

import pytest

from online_dpo.data.load import load_prompts
from online_dpo.objective.losses import LOSSES
from online_dpo.pairing.strategies import STRATEGIES
from support.run_files import fill_folder, trainer_of, write_run_file

REWARD = r"""
def count_words(completions, **_):
    return [float(sum(len(word) == 2 for word in text.split())) for text in completions]

def note(completions, **columns):
    columns = {name: columns[name] for name in ("id", "day", "n", "meta") if name in columns}
    with open("seen.txt", "a") as file:
        file.writelines(repr(dict(zip(columns, row))) + "\n" for row in zip(*columns.values()))
    return [float(len(text)) for text in completions]

def longer(prompts, completion_pairs, shuffle_order=True):
    return [int(len(second) > len(first)) for first, second in completion_pairs]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill_folder(tmp_path_factory.mktemp("run"), REWARD)


def run(folder, **fields):
    made = trainer_of(write_run_file(folder, **{"reward_funcs": "feedback.py:count_words", **fields}))
    made.train()
    return next(log for log in made.state.log_history if "prompts" in log)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(folder, name):
    assert "loss" in run(folder, loss_type=name, **({"label_smoothing": 1e-3} if name == "exo_pair" else {}))


@pytest.mark.parametrize("judged", [False, True])
@pytest.mark.parametrize(
    "fields",
    [dict(method="xpo", xpo_alpha="1e-4"), dict(method="nash_md", mixture_coef=[0.2, 0.5], temperature=1)],
    ids=lambda fields: fields["method"],
)
def test_every_method(folder, fields, judged):
    feedback = dict(reward_funcs=None, judge="feedback.py:longer") if judged else {}
    log = run(folder, num_completions=2, **fields, **feedback)
    assert log["pairs/count"] > 0 and 0 <= log["opponent/win_rate"] <= 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_selection(folder, name):
    assert run(folder, pair_selection=name)["pairs/count"] > 0


@pytest.mark.parametrize(
    "fields",
    [
        dict(loss_type=["sigmoid", "sft"], loss_weights=[1, 0.2]),
        dict(loss_type="robust", label_smoothing=0.1, use_weighting=True),
        dict(label_temperature=2, margin_weighting=True, min_margin=1, max_margin="1e1", max_length_ratio=4),
        dict(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.01),
        dict(loss_type=["simpo", "sft"], reference_free=True, beta=2),
        dict(reward_funcs=None, judge="feedback.py:longer", missing_eos_penalty=1),
        dict(target_kl=2, beta_gain="1e-1"),
    ],
    ids=lambda fields: ", ".join(fields),
)
def test_options(folder, fields):
    log = run(folder, **fields)
    assert log["pairs/count"] > 0 and log["loss"] > 0


FILES = {
    "values.jsonl": (
        """{"prompt": "w1 w2", "id": "007", "day": "2024-01-31", "n": 18, "meta": {"a": 1}}\n"""
        """{"prompt": "w3 w4", "id": "NA", "day": "2024-02-01", "n": 2.5, "meta": {"b": [null]}}\n""",
        [
            {"id": "007", "day": "2024-01-31", "n": 18, "meta": {"a": 1}},
            {"id": "NA", "day": "2024-02-01", "n": 2.5, "meta": {"b": [None]}},
        ],
    ),
    "values.csv": (
        "prompt,id,day,n\nw1 w2,007,2024-01-31,18\nw3 w4,NA,,2.5\n",
        [{"id": "007", "day": "2024-01-31", "n": 18.0}, {"id": "NA", "day": "", "n": 2.5}],
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_columns_reach_rewards_of_training_and_evaluation_as_they_stand_in_the_file(
    folder, tmp_path, monkeypatch, name, streaming
):
    content, rows = FILES[name]
    (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    types = {"n": "float64"} if name.endswith("csv") else None
    path = write_run_file(
        folder,
        reward_funcs="feedback.py:note",
        dataset_name=str(tmp_path / name),
        dataset_streaming=streaming,
        dataset_types=types,
        per_device_train_batch_size=2,
        num_completions=2,
    )
    made = trainer_of(path)
    made.train()
    made.evaluate(load_prompts(str(tmp_path / name), types=types))
    seen = (tmp_path / "seen.txt").read_text().splitlines()
    assert set(seen) == {repr(row) for row in rows} and len(seen) >= 8
