"""Which fields make a run another run, and how differences are told."""

import dataclasses

from online_dpo.checkpoints.identity import BATCH, NOT_COMPARED, compared_options, differences, gone_on_anyway
from online_dpo.config.trainer_config import OnlineDPOConfig

COMPARED_FIELDS = """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim
    optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
    average_tokens_across_devices max_grad_norm label_smoothing_factor bf16 fp16 bf16_full_eval fp16_full_eval
    tf32 use_liger_kernel liger_kernel_config neftune_noise_alpha auto_find_batch_size metric_for_best_model
    greater_is_better full_determinism seed data_seed accelerator_config parallelism_config dataloader_drop_last
    remove_unused_columns label_names train_sampling_strategy length_column_name
    num_completions max_new_tokens max_length max_prompt_length truncate_prompts temperature top_p top_k min_p
    repetition_penalty generation_kwargs max_staleness prompt_column prompt_template chat_template_kwargs
    reward_weights reward_normalization missing_eos_penalty length_penalty judge_top pair_selection min_margin
    max_margin max_length_ratio margin_weighting label_temperature tie_policy resample_rounds beta loss_type
    loss_weights label_smoothing simpo_gamma dpop_lambda use_weighting reference_free sync_ref_model
    ref_model_mixup_alpha ref_model_sync_steps disable_dropout method xpo_alpha mixture_coef target_kl beta_gain
    beta_range vllm_structured_outputs_regex skipped_step_lr_factor skipped_step_lr_recovery
"""
"""Fields that change what is computed. A new field goes here, or into `NOT_COMPARED`."""
COMPARED = set(COMPARED_FIELDS.split())


def test_every_field_is_compared_or_known_not_to_change_what_is_computed():
    fields = {field.name for field in dataclasses.fields(OnlineDPOConfig) if field.init}
    assert not COMPARED & NOT_COMPARED
    assert fields - COMPARED - NOT_COMPARED == set(), "decide for each new field: does it change what is computed?"
    assert fields >= COMPARED


def test_the_options_that_are_compared_are_json_without_secrets(tmp_path):
    args = OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], hub_token="hf_secret", beta=[0.1, 0.2])
    options = compared_options(args.to_dict(), 2)
    assert options["beta"] == [0.1, 0.2] and options["lr_scheduler_type"] == "linear" and options["seed"] == 42
    assert "hf_secret" not in str(options) and str(tmp_path) not in str(options)


def test_the_prompts_of_a_step_are_compared_however_they_are_cut():
    def batch(processes, **options):
        return compared_options(options, processes).get(BATCH)

    assert batch(2, per_device_train_batch_size=4, gradient_accumulation_steps=1) == 8
    assert batch(1, per_device_train_batch_size=2, gradient_accumulation_steps=4) == 8
    split = {"per_device_train_batch_size": 8, "accelerator_config": {"split_batches": True}}
    assert batch(2, **split) == 8


def test_what_deepspeed_computes_is_compared_and_how_it_shards_is_not():
    adam, sgd = ({"zero_optimization": {"stage": s}, "optimizer": {"type": t}} for s, t in ((3, "Adam"), (2, "SGD")))
    compared = [compared_options({"deepspeed": file}, 1) for file in (adam, {**adam, "zero_optimization": {}}, sgd)]
    assert differences(compared[0], compared[1]) == [] == differences(compared[0], compared_options({}, 1))
    assert differences(compared[0], compared[2]) == ["deepspeed.optimizer.type: checkpoint has Adam, this run has SGD"]


def test_differences_are_named_with_both_values():
    saved = {"seed": 0, "beta": [0.1], "peft_config": {"r": 4, "bias": "none"}, "gone": 1, "template": "x" * 200}
    own = {"seed": 0, "beta": 0.1, "peft_config": {"r": 8, "bias": "none", "new": 1}, "added": 2, "template": None}
    assert differences(saved, own) == [
        "beta: checkpoint has [0.1], this run has 0.1",
        "peft_config.r: checkpoint has 4, this run has 8",
        f"template: checkpoint has {'x' * 77}..., this run has null",
    ]


def test_a_run_that_goes_on_anyway_is_told_what_the_optimizer_decides(tmp_path):
    said = gone_on_anyway(tmp_path, ["seed: a", "learning_rate: b", "weight_decay: c"])
    assert "The optimizer's state in it decides learning_rate, weight_decay." in said
    assert "optimizer" not in gone_on_anyway(tmp_path, ["seed: a"])
