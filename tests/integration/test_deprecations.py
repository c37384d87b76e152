"""Nothing that this package asks of others is going to be taken away."""

import warnings

import pytest
from peft import LoraConfig

from support import tiny
from support.training import dataset, trainer

OF_PEFT = "`is_gradient_checkpointing` is deprecated"
"""PEFT 0.21 asks so while it puts an adapter around a model."""


@pytest.mark.parametrize("adapted", [False, True])
def test_a_run_with_everything_that_is_on_by_default(tmp_path, adapted):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = trainer(
            tmp_path,
            model=tiny.causal_lm(sharpness=1.0),
            gradient_checkpointing=True,
            max_steps=2,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            kwargs={"eval_dataset": dataset((5, 3)), "peft_config": LoraConfig() if adapted else None},
        )
        made.train()
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        made.save_model()
    deprecated = [w for w in said if issubclass(w.category, FutureWarning | DeprecationWarning)]
    ours = [w for w in deprecated if not (adapted and str(w.message).startswith(OF_PEFT))]
    assert [f"{w.filename}:{w.lineno}: {w.message}" for w in ours] == []
