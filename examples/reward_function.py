"""Two rewards in Python: one reads the answer's text, one reads a column of the prompt's row.

online-dpo quickstart                 # makes the tiny policy and the prompts that are the defaults here
python examples/reward_function.py
python examples/reward_function.py --model Qwen/Qwen2.5-0.5B-Instruct --prompts questions.jsonl --learning-rate 1e-6
"""

import argparse

from datasets import load_dataset
from transformers import AutoTokenizer

from online_dpo import OnlineDPOConfig, OnlineDPOTrainer, ProgressDisplay

START = "runs/quickstart/start"


def right(completions: list[str], answer: list[str], **columns) -> list[float]:
    """1 for a completion that has the text of the row's column ``answer`` in it."""
    return [float(text.lower() in completion.lower()) for completion, text in zip(completions, answer, strict=True)]


def short(completions: list[str], **columns) -> list[float | None]:
    """Less for each word; nothing said of an empty completion, which then takes part in no pair."""
    return [-float(len(text.split())) if text.strip() else None for text in completions]


def main(words: list[str] | None = None) -> list[dict]:
    """Train, and return what was logged."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=f"{START}/policy")
    parser.add_argument("--prompts", default=f"{START}/prompts_train.jsonl", help="with the columns prompt and answer")
    parser.add_argument("--output", default="runs/reward_function")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(words)
    trainer = OnlineDPOTrainer(
        model=options.model,
        reward_funcs=[right, short],
        args=OnlineDPOConfig(
            output_dir=options.output,
            reward_weights=[1.0, 0.02],
            **{"num_completions": 4, "max_new_tokens": 48, "max_length": 128},
            learning_rate=options.learning_rate,
            max_steps=options.steps,
            logging_steps=5,
            run_folder=True,  # for `online-dpo dashboard runs/reward_function`
        ),
        train_dataset=load_dataset("json", data_files=options.prompts, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[ProgressDisplay()],
    )
    trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
