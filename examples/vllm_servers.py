"""Completions from vLLM servers, which are sent the new weights before each step. Start the servers first:

pip install 'online-dpo[vllm]'
CUDA_VISIBLE_DEVICES=1 online-dpo serve Qwen/Qwen2.5-0.5B-Instruct --port 8000
CUDA_VISIBLE_DEVICES=2 online-dpo serve Qwen/Qwen2.5-0.5B-Instruct --port 8001
CUDA_VISIBLE_DEVICES=0 python examples/vllm_servers.py --servers http://localhost:8000,http://localhost:8001
"""

import argparse

from datasets import load_dataset
from transformers import AutoTokenizer

from online_dpo import OnlineDPOConfig, OnlineDPOTrainer, ProgressDisplay


def near_50_words(completions: list[str], **columns) -> list[float]:
    """Best are answers of 50 words."""
    return [-abs(len(text.split()) - 50.0) for text in completions]


def main(words: list[str] | None = None) -> list[dict]:
    """Train, and return what was logged."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="the model that the servers were given")
    parser.add_argument("--prompts", default="runs/quickstart/start/prompts_train.jsonl", help="with the column prompt")
    parser.add_argument("--servers", default="http://localhost:8000", help="addresses, with commas")
    parser.add_argument("--output", default="runs/vllm_servers")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    options = parser.parse_args(words)
    trainer = OnlineDPOTrainer(
        model=options.model,
        reward_funcs=near_50_words,
        args=OnlineDPOConfig(
            output_dir=options.output,
            use_vllm=True,
            vllm_mode="server",
            vllm_server_base_url=options.servers,
            max_staleness=1,  # the next step is sampled while this one is trained on; 0 waits
            num_completions=4,
            max_new_tokens=options.tokens,
            max_length=options.tokens + 82,
            max_steps=options.steps,
            logging_steps=5,
            run_folder=True,
        ),
        train_dataset=load_dataset("json", data_files=options.prompts, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[ProgressDisplay()],
    )
    trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
