"""Code that is not ours fails in mid-run: an error that names it and the row, after a checkpoint of the steps done."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import LlamaForSequenceClassification, TrainerCallback

from online_dpo import OnlineDPOTrainer
from online_dpo.cli.main import main
from online_dpo.data.collate import collate_prompts
from online_dpo.errors import ForeignCodeError, ScoringError, UnknownTokenError
from online_dpo.scoring.event_loop import submit, wait_for
from support import tiny
from support.run_files import fill_folder, write_run_file
from support.training import config, dataset, trainer, weights

IN_ORDER = dict(per_device_train_batch_size=4, train_sampling_strategy="sequential", max_steps=3)
"""Rows 0 to 3 in the first step, 4 to 7 in the second: what fails at row 5 fails in the second."""


def reward_model():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(tiny.config("llama", num_labels=1)).eval()


def fails_in(made, error, message, step=1):
    """The run ends so, with a checkpoint of ``step``, of which the error tells."""
    folder = made.args.output_dir
    with pytest.raises(error, match=message) as caught:
        made.train()
    assert caught.value.__cause__ is not None or error is UnknownTokenError
    assert made.state.global_step == step
    if step:
        assert torch.load(f"{folder}/checkpoint-{step}/optimizer.pt")["state"]
        assert caught.value.__notes__ == [
            f"Before that, a checkpoint of the steps done was saved: {folder}/checkpoint-{step}"
        ]
    return caught.value


# --- what scores ----------------------------------------------------------------------------------------------------


def test_a_reward_model_whose_template_refuses_a_later_row(tmp_path):
    rows = [[{"role": "user", "content": prompt.content}] for prompt in tiny.prompts([4] * 12)]
    rows[5][0]["content"] = "w1 forbidden w2"
    refusing = tiny.tokenizer(chat=True)
    check = "{% for m in messages %}{% if 'forbidden' in m.content %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    refusing.chat_template = check + refusing.chat_template
    made = OnlineDPOTrainer(
        model=tiny.causal_lm(sharpness=1.0),
        reward_funcs=reward_model(),
        reward_processing_classes=refusing,
        args=config(tmp_path, **IN_ORDER),
        train_dataset=Dataset.from_dict({"prompt": rows}),
        processing_class=tiny.tokenizer(chat=True),
    )
    fails_in(
        made,
        ScoringError,
        r"The chat template of reward model `Llama.*` raised TemplateError: no \(row 5: 'w1 forbidden w2'\)",
    )


def texts(row_5):
    prompts = [prompt.content for prompt in tiny.prompts([4] * 12)]
    prompts[5] = row_5
    return Dataset.from_dict({"prompt": prompts})


def test_a_reward_model_that_meets_a_token_without_an_embedding(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<padding>"], special_tokens=True)
    kwargs = dict(reward_processing_classes=tokenizer)
    made = trainer(
        tmp_path, reward_funcs=reward_model(), train_dataset=texts("w1 <padding>"), kwargs=kwargs, **IN_ORDER
    )
    fails_in(made, UnknownTokenError, r"has embeddings for 44 .* has token 44 \(row 5: 'w1 <padding>'\)")


class Scorer:
    name = "house"

    def __init__(self, answer):
        self.answer = answer

    def score(self, groups):
        values = [[float(len(c.text)) for c in group.completions] for group in groups]
        return values if groups[0].prompt.row < 4 else self.answer(values)


class Judge:
    """Of the package's own form."""

    name = "court"

    def __init__(self, answer):
        self.answer = answer

    def prefer(self, comparisons):
        values = [float(len(a.text) > len(b.text)) for a, b in (comparison.completions for comparison in comparisons)]
        return values if comparisons[0].prompt.row < 4 else self.answer(values)


class OldJudge:
    """Of TRL's form."""

    def __init__(self, answer):
        self.answer = answer

    def judge(self, prompts, completions, shuffle_order=True):
        ranks = [int(len(b) > len(a)) for a, b in completions]
        return self.answer(ranks) if getattr(self, "asked", False) else setattr(self, "asked", True) or ranks


def boom(values):
    raise KeyError("answer")


SCORERS = [
    (boom, r"Scorer `house` raised KeyError: 'answer' \(among rows 4, 5, 6, 7\)"),
    (lambda values: None, "Scorer `house` raised TypeError: 'NoneType' object is not iterable"),
    (lambda values: [["high", "low"] for _ in values], r"Scorer `house` gave str 'high'; wanted: numbers \(row 4: "),
]
JUDGES = [
    (Judge(boom), r"Judge `court` raised KeyError: 'answer' \(among rows "),
    (Judge(lambda values: values[:-1]), r"Judge `court` gave \d preferences for \d pairs"),
    (Judge(lambda values: ["first" for _ in values]), "Judge `court` returned str 'first' for a pair"),
    (OldJudge(boom), r"Judge `OldJudge` raised KeyError: 'answer' \(among rows "),
]


def chained(error):
    return error.__cause__ is not None


@pytest.mark.parametrize(("answer", "message"), SCORERS)
def test_a_scorer_of_one_s_own(tmp_path, answer, message):
    made = trainer(tmp_path, reward_funcs=Scorer(answer), **IN_ORDER)
    with pytest.raises(ScoringError, match=message) as caught:
        made.train()
    assert (tmp_path / "checkpoint-1").is_dir() and chained(caught.value) == ("raised" in message)


@pytest.mark.parametrize(("judge", "message"), JUDGES)
def test_a_judge_of_one_s_own(tmp_path, judge, message):
    made = trainer(tmp_path, reward_funcs=None, kwargs={"judge": judge}, **IN_ORDER)
    with pytest.raises(ScoringError, match=message) as caught:
        made.train()
    assert (tmp_path / "checkpoint-1").is_dir() and chained(caught.value) == ("raised" in message)


def test_a_judge_function_names_the_row(tmp_path):
    def compare(prompt, first, second):
        return 1 / 0 if prompt == row_5 else len(first) > len(second)

    row_5 = "w1 w2 w3"
    made = trainer(tmp_path, reward_funcs=None, train_dataset=texts(row_5), kwargs={"judge": compare}, **IN_ORDER)
    fails_in(made, ScoringError, r"Judge `compare` raised ZeroDivisionError: division by zero \(row 5: 'w1 w2 w3'\)")


# --- what reads -----------------------------------------------------------------------------------------------------


def test_a_data_collator(tmp_path):
    """Batches are read one ahead."""

    def collate(rows):
        return collate_prompts(rows) if rows[0]["prompt_row"] < 8 else rows["all"]

    made = trainer(tmp_path, kwargs={"data_collator": collate}, **IN_ORDER)
    fails_in(made, ForeignCodeError, r"Data collator `collate` raised TypeError: .* \(rows 8, 9, 10, 11\)")


def test_a_stream_whose_source_fails(tmp_path):
    def rows():
        yield from [{"prompt": "w1 w2"}] * 10
        raise ConnectionResetError("the storage is away")

    made = trainer(tmp_path, train_dataset=IterableDataset.from_generator(rows), max_steps=3)
    fails_in(made, ForeignCodeError, r"Reading the training prompts raised ConnectionResetError: the storage is away")


# --- callbacks, metrics, optimizers ---------------------------------------------------------------------------------

EVENTS = {  # and the step that is done when the run ends
    "on_train_begin": 0,
    "on_step_begin": 1,
    "on_pre_optimizer_step": 1,
    "on_optimizer_step": 2,
    "on_step_end": 2,
    "on_log": 2,
    "on_evaluate": 2,
    "on_prediction_step": 2,
    "on_save": 2,
    "on_train_end": 3,
}


def failing_callback(event, failing_step):
    def fail(self, args, state, control, **kwargs):
        if state.global_step == failing_step:
            raise OSError("no space left")

    return type("Watcher", (TrainerCallback,), {event: fail})()


@pytest.mark.parametrize(("event", "done"), EVENTS.items())
def test_a_callback(tmp_path, event, done):
    before_the_step_counts = event in ("on_pre_optimizer_step", "on_step_begin", "on_optimizer_step")
    failing_step = 1 if before_the_step_counts else done
    options = dict(IN_ORDER, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    kwargs = {"callbacks": [failing_callback(event, failing_step)], "eval_dataset": dataset((3, 4))}
    made = trainer(tmp_path, kwargs=kwargs, **options)
    with pytest.raises(ForeignCodeError, match=f"Callback `Watcher` in `{event}` raised OSError: no space left") as got:
        made.train()
    assert isinstance(got.value.__cause__, OSError)
    assert made.state.global_step == done
    assert [int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")] == ([done] if done else []) or (
        done == 3 and (tmp_path / "checkpoint-3").is_dir()
    )


def test_the_update_is_not_made_where_a_callback_failed_before_it(tmp_path):
    made = trainer(tmp_path, kwargs={"callbacks": [failing_callback("on_pre_optimizer_step", 0)]}, learning_rate=0.1)
    with pytest.raises(ForeignCodeError):
        made.train()
    start = weights(tiny.causal_lm(sharpness=1.0))
    assert all(torch.equal(p, start[name]) for name, p in weights(made.model).items())


@pytest.mark.parametrize(
    ("event", "max_staleness"),
    [
        ("on_pre_optimizer_step", 1),
        *(
            pytest.param(event, 0, marks=pytest.mark.slow)
            for event in ("on_step_begin", "on_pre_optimizer_step", "on_log")
        ),
        *(pytest.param(event, 1, marks=pytest.mark.slow) for event in ("on_step_begin", "on_log")),
    ],
)
def test_the_run_goes_on_from_the_checkpoint_bit_for_bit(tmp_path, event, max_staleness):
    options = dict(max_steps=4, disable_dropout=False, lr_scheduler_type="linear", max_staleness=max_staleness)

    def with_dropout():
        return tiny.causal_lm("gpt2", sharpness=1.0, resid_pdrop=0.2, embd_pdrop=0.2)

    whole = trainer(tmp_path / "whole", model=with_dropout(), **options)
    whole.train()
    kwargs = {"callbacks": [failing_callback(event, 2)]}
    failed = trainer(tmp_path / "failed", model=with_dropout(), kwargs=kwargs, **options)
    with pytest.raises(ForeignCodeError):
        failed.train()
    resumed = trainer(tmp_path / "failed", model=with_dropout(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and (tmp_path / "failed" / "checkpoint-2").is_dir()
    for name, expected in weights(whole.model).items():
        assert torch.equal(resumed.model.get_parameter(name), expected), name


def metrics_that_fail(prediction):
    return {"best": prediction.predictions.argmax(axis="rows")}


@pytest.mark.slow
def test_metrics_and_gold_in_an_evaluation(tmp_path):
    def gold(completions, **_):
        raise LookupError("no such answer")

    options = dict(eval_strategy="steps", eval_steps=1, **IN_ORDER)
    for kwargs, error, message in (
        ({"compute_metrics": metrics_that_fail}, ForeignCodeError, "`compute_metrics` .`metrics_that_fail`. raised"),
        (
            {"eval_reward_funcs": gold},
            ScoringError,
            r"Reward function `gold` raised LookupError: .* \(among rows 0, 1\)",
        ),
    ):
        made = trainer(tmp_path / message[1:5], kwargs={"eval_dataset": dataset((3, 4)), **kwargs}, **options)
        fails_in(made, error, message)


def test_an_optimizer_or_a_schedule_leaves_no_half_done_step(tmp_path):
    class Stumbling(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            if self.param_groups[0].get("second"):
                raise ArithmeticError("overflow")
            self.param_groups[0]["second"] = True

    model = tiny.causal_lm(sharpness=1.0)
    optimizer = Stumbling(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    options = dict(IN_ORDER, save_strategy="steps", save_steps=1)
    made = trainer(tmp_path, model=model, kwargs={"optimizers": (optimizer, schedule)}, **options)
    with pytest.raises(ForeignCodeError, match=r"Optimizer `Stumbling` or its schedule `ConstantLR` raised Arithmetic"):
        made.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


class Ending(BaseException):
    def __str__(self):
        raise RuntimeError


ENDINGS = {
    SystemExit(0): (ForeignCodeError, "Callback `Leaving` in `on_step_end` raised SystemExit: 0 .step 1."),
    KeyboardInterrupt("by itself"): (ForeignCodeError, "in `on_step_end` raised KeyboardInterrupt: by itself .step 1."),
    Ending(): (ForeignCodeError, "raised Ending: .its message cannot be shown: RuntimeError. .step 1."),
    ExceptionGroup("two", [OSError("a"), ValueError("b")]): (ForeignCodeError, "two .2 sub-exceptions.: OSError: a; V"),
    RecursionError("deep"): (ForeignCodeError, "raised RecursionError: deep"),
    MemoryError("full"): (MemoryError, "full"),
    torch.OutOfMemoryError("full"): (torch.OutOfMemoryError, "full"),
}


@pytest.mark.parametrize(("raised", "told"), ENDINGS.items(), ids=[type(one).__name__ for one in ENDINGS])
def test_whatever_a_callback_raises_leaves_a_checkpoint(tmp_path, raised, told):
    class Leaving(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise raised

    made = trainer(tmp_path, kwargs={"callbacks": [Leaving()]})
    with pytest.raises(told[0], match=told[1]):
        made.train()
    assert (tmp_path / "checkpoint-1" / "optimizer.pt").is_file()


def exits(values):
    raise SystemExit("done")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"reward_funcs": Scorer(exits)}, "Scorer `house` raised SystemExit: done"),
        ({"reward_funcs": None, "kwargs": {"judge": Judge(exits)}}, "Judge `court` raised SystemExit: done"),
        ({"reward_funcs": None, "kwargs": {"judge": OldJudge(exits)}}, "Judge `OldJudge` raised SystemExit: done"),
    ],
)
def test_sys_exit_in_what_scores(tmp_path, part, message):
    made = trainer(tmp_path, **part, **IN_ORDER)
    with pytest.raises(ScoringError, match=message):
        made.train()
    assert (tmp_path / "checkpoint-1").is_dir()


def test_sys_exit_in_an_async_reward_and_in_a_task_that_it_starts(tmp_path):
    """`asyncio` would end its loop, and with it the thread that all async rewards share."""

    async def leave():
        raise SystemExit("done")

    async def starts_a_task(completions, trainer_state, **_):
        if trainer_state.global_step:
            await asyncio.create_task(leave())
        return [float(len(text)) for text in completions]

    made = trainer(tmp_path, reward_funcs=starts_a_task, **IN_ORDER)
    fails_in(made, ScoringError, "Reward function `starts_a_task` raised SystemExit: done")
    assert wait_for(submit(asyncio.sleep(0, "still there"))) == "still there"


@pytest.mark.parametrize("taken", ["loss", "pair_selection", "engine"])
def test_what_a_plugin_registers_is_named(tmp_path, taken):
    def away(*args, **kwargs):
        raise LookupError("away")

    made = trainer(tmp_path, **IN_ORDER)
    if taken == "loss":
        made.objective.method = SimpleNamespace(losses=away, epoch_options=lambda *_: {})
        message = r"Loss `sigmoid` raised LookupError: away \(step 0\)"
    elif taken == "engine":
        made.sampler.engine.generate = away
        message = "Engine `TransformersEngine` raised LookupError: away"
    else:
        made.collector.form_pairs._method = SimpleNamespace(form_pairs=away)
        message = "Method `online_dpo` with `pair_selection='best_worst'` raised LookupError: away .among rows 0, 1"
    with pytest.raises(ForeignCodeError, match=message):
        made.train()


def test_outside_of_training_it_is_raised_at_once(tmp_path):
    made = trainer(tmp_path, kwargs={"callbacks": [failing_callback("on_evaluate", 0)]})
    with pytest.raises(ForeignCodeError, match="Callback `Watcher` in `on_evaluate` raised OSError"):
        made.evaluate(dataset((3,)))


FEEDBACK = """
def words(completions, trainer_state):
    if trainer_state.global_step:
        raise ConnectionError("away")
    return [float(len(c.split())) for c in completions]
"""


def test_on_the_command_line(tmp_path, capsys):
    folder = fill_folder(tmp_path, FEEDBACK)
    path = write_run_file(folder, reward_funcs="feedback.py:words", max_steps=3, per_device_train_batch_size=4)
    capsys.readouterr()
    assert main(["train", str(path)]) == 1
    said = capsys.readouterr().err
    assert "error: Reward function `words` raised ConnectionError: away (among rows " in said
    assert f"checkpoint saved in {folder / 'out' / 'checkpoint-1'}" in said and "Traceback (most" not in said
