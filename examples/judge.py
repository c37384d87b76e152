"""A judge in place of a reward: a function of your own, or a language model behind an OpenAI-compatible address.

online-dpo quickstart                 # makes the tiny policy and the prompts that are the defaults here
python examples/judge.py
python examples/judge.py --url http://localhost:8000/v1 --judge my-judge   # pip install 'online-dpo[judge]'
"""

import argparse

from datasets import load_dataset
from transformers import AutoTokenizer

from online_dpo import OnlineDPOConfig, OnlineDPOTrainer, ProgressDisplay
from online_dpo.scoring import LLMJudge

START = "runs/quickstart/start"
RUBRIC = "The better answer is polite and short."


def polite_and_short(prompt: str, first: str, second: str) -> float:
    """The probability that the first answer is better: the polite one, else the shorter one by its share of words."""
    thanks = [any(word in text.lower() for word in ("please", "hope", "good")) for text in (first, second)]
    if thanks[0] != thanks[1]:
        return 0.9 if thanks[0] else 0.1
    lengths = [1 + len(text.split()) for text in (first, second)]
    return lengths[1] / sum(lengths)


def main(words: list[str] | None = None) -> list[dict]:
    """Train, and return what was logged."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=f"{START}/policy")
    parser.add_argument("--prompts", default=f"{START}/prompts_train.jsonl", help="with the column prompt")
    parser.add_argument("--url", help="the judge's address; without it the function above judges")
    parser.add_argument("--judge", default="my-judge", help="the name of the judging model at that address")
    parser.add_argument("--output", default="runs/judge")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(words)
    judge = LLMJudge(model=options.judge, rubric=RUBRIC, base_url=options.url) if options.url else polite_and_short
    sampling = {"num_completions": 2, "max_new_tokens": 48, "max_length": 128}
    training = {"learning_rate": 1e-4, "max_steps": options.steps, "logging_steps": 5}
    trainer = OnlineDPOTrainer(
        model=options.model,
        judge=judge,
        args=OnlineDPOConfig(output_dir=options.output, run_folder=True, **sampling, **training),
        train_dataset=load_dataset("json", data_files=options.prompts, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[ProgressDisplay()],
    )
    trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
