"""What a checkpoint of the comparison by quality is worth: its gold score and its KL to the start.

Ours and TRL's are measured by the same code, `online-dpo eval`'s, on the same prompts and with the same random numbers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCORES = "scores.json"


@dataclass(frozen=True)
class HeldOut:
    """The prompts to evaluate on: how many of the quickstart's test prompts, and the seed of the answers."""

    prompts: int
    seed: int = 0


def scored(points: list[dict[str, Any]], start: Path, run: Path, held_out: HeldOut) -> list[dict[str, Any]]:
    """The points of a training with ``gold`` (value and 95 % interval) and ``kl`` (value and standard error), after one
    for the start itself. They are kept in the run's folder, and not measured again.
    """
    file = run / SCORES
    known = json.loads(file.read_text()) if file.exists() else {}
    models = [start / "policy", *(run / point["folder"] for point in points)]
    scores = []
    for model in models:
        key = f"{model.name}, {held_out.prompts} prompts, seed {held_out.seed}"
        if key not in known:
            known[key] = _scores(model, start, held_out)
            file.write_text(json.dumps(known, indent=1) + "\n")
        scores.append(known[key])
    times = [{"step": 0, "cpu_seconds": 0.0}, *points]
    return [
        {"step": time["step"], "cpu_seconds": time["cpu_seconds"], **score}
        for time, score in zip(times, scores, strict=True)
    ]


def _scores(model: Path, start: Path, held_out: HeldOut) -> dict[str, Any]:
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from online_dpo import OnlineDPOConfig
    from online_dpo.data.load import load_prompts
    from online_dpo.evaluation.comparison import compare
    from online_dpo.evaluation.head_to_head import Sampling, answer, prepare_model, score_answers
    from online_dpo.quickstart.rubric import rubric_score
    from online_dpo.quickstart.run import training_settings
    from online_dpo.scoring.penalties import NO_PENALTIES
    from online_dpo.scoring.registry import build_scorers

    disable_progress_bar()
    sampled_as = {name: training_settings()[name] for name in ("max_new_tokens", "max_length", "temperature")}
    args = OnlineDPOConfig(**sampled_as, seed=held_out.seed, use_cpu=True, report_to=[], disable_tqdm=True)
    dataset = load_prompts(str(start / "prompts_test.jsonl"), limit=held_out.prompts)
    tokenizer = AutoTokenizer.from_pretrained(start / "policy")
    compared = [prepare_model(str(path), tokenizer, dataset, args) for path in (model, start / "policy")]
    answers = answer(compared[0], compared[1], args, Sampling())
    results = score_answers(answers, build_scorers([rubric_score], None, args, state=None), None, NO_PENALTIES)
    figures = compare(results, held_out.seed)
    gold = {name: figures["score"]["model"][name] for name in ("value", "low", "high")}
    return {"gold": gold, "kl": figures["kl"]}
