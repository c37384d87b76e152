"""What a run asks for in ways of sharding: known, in one form, and refused with what to write instead."""

import json
from pathlib import Path
from typing import Any

import pytest

from online_dpo.config.sharding import OPTIMIZERS, ShardingError, asked_sharding, read_options, settle_precision

ZERO: dict[str, Any] = {"zero_optimization": {"stage": 2}}
FSDP_LAUNCH = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO_LAUNCH = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
TWO = {"WORLD_SIZE": "2", "RANK": "0"}


@pytest.fixture(autouse=True)
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)


def zero(stage: int = 3, **options: Any) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": {"stage": stage, **options}}}


def fsdp(**options: Any) -> dict[str, Any]:
    return {"fsdp": True, "fsdp_config": options}


REFUSED = [
    (fsdp(version=1), "fsdp_config", "asks for FSDP1.* Write `fsdp_config: {version: 2}`"),
    (fsdp(fsdp_version=1), "fsdp_config", "asks for FSDP1"),
    (fsdp(use_orig_params=True), "fsdp_config", "`use_orig_params` is an option of FSDP1"),
    (fsdp(reshard_after_forward="full_shard"), "fsdp_config", "`reshard_after_forward` is 'full_shard'; wanted: true"),
    (fsdp(cpu_ofload=True), "fsdp_config", "Did you mean `cpu_offload`"),
    (fsdp(state_dict_type="LOCAL_STATE_DICT"), "fsdp_config", "wanted: one of FULL_STATE_DICT"),
    (fsdp(activation_checkpointing=True) | {"gradient_checkpointing": False}, "fsdp_config", "both mean the same"),
    ({"fsdp_config": {"version": 2}}, "fsdp_config", "no effect without `fsdp: true`"),
    ({"fsdp": "hybrid_shard auto_wrap"}, "fsdp", "`fsdp: hybrid_shard` is not supported"),
    ({"fsdp": "no_shard"}, "fsdp", "Leave `fsdp` out"),
    ({"fsdp": "ful_shard"}, "fsdp", "wanted: `true`"),
    ({"fsdp": True} | zero(), "fsdp", "`fsdp` and `deepspeed` are given together. Give one of them"),
    ({"fsdp": True, "optim": "adafactor"}, "optim", "was not compared with one process under FSDP2. Use one of adamw"),
    (zero() | {"optim": "adamw_bnb_8bit"}, "optim", "under ZeRO-3"),
    ({"fsdp": True, "torch_compile": True}, "torch_compile", "not supported with FSDP2"),
    ({"fsdp": True, "fp16": True}, "fp16", "Use `bf16`"),
    (zero() | {"fp16": True}, "deepspeed", "Use `bf16`"),
    ({"deepspeed": {}}, "deepspeed", "stage 0, which shards nothing. Leave `deepspeed` out"),
    (zero(0), "deepspeed", "stage 0, which shards nothing"),
    (zero(4), "deepspeed", "`stage` is 4; wanted: 1, 2 or 3"),
    (zero(zero_quantized_weights=True), "deepspeed", "`zero_quantized_weights` is not supported"),
    (zero(zero_hpz_partition_size=8), "deepspeed", "`zero_hpz_partition_size` is not supported"),
    (zero(mics_shard_size=2), "deepspeed", "`mics_shard_size` is not supported"),
    (zero(zenflow={"topk_ratio": 0.1}), "deepspeed", "`zenflow` is not supported"),
    (zero(offload_optimizer={"device": "nvme"}), "deepspeed", "`device: nvme` is not supported. Write `cpu`"),
    (zero(2, offload_param={"device": "cpu"}), "deepspeed", "only stage 3 partitions; the stage is 2"),
    (zero(cpu_offload=True), "deepspeed", "`cpu_offload` is an old form. Write `offload_optimizer"),
    (zero(compute_grad_norm=False), "deepspeed", "`compute_grad_norm: false` is not supported"),
    (zero(stage3_max_live_parameter=1), "deepspeed", "Did you mean `stage3_max_live_parameters`"),
    ({"deepspeed": ZERO | {"managed_gradient_accumulation": False}}, "deepspeed", "accumulation: false` is not supp"),
    ({"deepspeed": ZERO | {"tensor_parallel": {"autotp_size": 2}}}, "deepspeed", "`tensor_parallel` is not supported"),
    ({"deepspeed": ZERO | {"optimizer": {"type": "Muon"}}}, "deepspeed", "`optimizer` would replace `optim`"),
    ({"deepspeed": ZERO | {"scheduler": {"type": "WarmupLR"}}}, "deepspeed", "would replace `lr_scheduler_type`"),
    ({"deepspeed": ZERO | {"gradient_cliping": 1.0}}, "deepspeed", "Did you mean `gradient_clipping`"),
    ({"deepspeed": ZERO | {"fp16": {"enabled": True}}}, "deepspeed", "fp16 is not supported"),
    ({"deepspeed": ZERO | {"bf16": {"enabled": True}}, "bf16": False}, "deepspeed", "and the run `bf16: false`"),
    (
        {"deepspeed": ZERO | {"gradient_clipping": 2.0}, "max_grad_norm": 0.5},
        "deepspeed",
        "says `gradient_clipping: 2.0`, and the run's `max_grad_norm` is 0.5",
    ),
    (
        {"deepspeed": ZERO | {"train_batch_size": 8}, "per_device_train_batch_size": 8},
        "deepspeed",
        "says `train_batch_size: 8`, and the run's batch sizes, of all processes together, are 16",
    ),
    ({"deepspeed": "nowhere.json"}, "deepspeed", "there is no such file"),
    ({"deepspeed": '{"a": '}, "deepspeed", "is no JSON"),
    ({"ds3_gather_for_generation": False}, "ds3_gather_for_generation", "would wait for each other for ever"),
    ({"model_init_kwargs": {"tp_plan": "auto"}}, "model_init_kwargs", "`tp_plan` splits a model"),
]


@pytest.mark.parametrize(("values", "field", "message"), REFUSED)
def test_what_is_refused(values: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(ShardingError, match=message) as raised:
        asked_sharding(values)
    assert raised.value.field == field


LAUNCHED = [
    ({"ACCELERATE_USE_FSDP": "true"}, "accelerate's launcher asks for FSDP1.*`fsdp_version: 2` under `fsdp_config`"),
    (FSDP_LAUNCH | {"FSDP_STATE_DICT_TYPE": "LOCAL_STATE_DICT"}, "launcher: `state_dict_type`"),
    (ZERO_LAUNCH | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "stage 0"),
    (ZERO_LAUNCH | {"ACCELERATE_GRADIENT_CLIPPING": "3.0"}, "`gradient_clipping: 3.0`, and the run's `max_grad_norm`"),
    (ZERO_LAUNCH | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "`gradient_accumulation_steps: 4`"),
    (ZERO_LAUNCH | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "`device: nvme`"),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "`parallelism_config`. are not supported"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
]


@pytest.mark.parametrize(("environment", "message"), LAUNCHED)
def test_what_a_launcher_may_not_ask_for(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ShardingError, match=message) as raised:
        asked_sharding({}, TWO | environment)
    assert raised.value.field is None


def test_every_way_to_ask_for_fsdp_gives_one_form() -> None:
    ways = [
        asked_sharding({"fsdp": "full_shard auto_wrap"}),
        asked_sharding(fsdp(reshard_after_forward=True)),
        asked_sharding(fsdp(fsdp_reshard_after_forward="true", fsdp_version="2", xla=False)),
        asked_sharding({}, TWO | FSDP_LAUNCH | {"FSDP_RESHARD_AFTER_FORWARD": "true"}),
    ]
    for way in ways:
        assert way is not None and way.name == "FSDP2"
        assert way.options == {
            "version": 2,
            "reshard_after_forward": True,
            "activation_checkpointing": False,
            "cpu_ram_efficient_loading": False,
        }


@pytest.mark.parametrize("name", ["cpu_ram_efficient_loading", "activation_checkpointing"])
def test_what_the_package_does_itself_is_switched_off(name: str) -> None:
    """All ranks load whole models, and `gradient_checkpointing` recomputes activations."""
    for way in (
        asked_sharding(fsdp(**{name: True})),
        asked_sharding({}, TWO | FSDP_LAUNCH | {f"FSDP_{name.upper()}": "true"}),
    ):
        assert way is not None and way.options[name] is False


def test_every_way_to_ask_for_zero_gives_one_form(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(ZERO))
    ways = [
        asked_sharding({"deepspeed": ZERO}),
        asked_sharding({"deepspeed": str(file)}),
        asked_sharding({"deepspeed": json.dumps(ZERO)}),
        asked_sharding({}, TWO | ZERO_LAUNCH),
        asked_sharding({}, TWO | ZERO_LAUNCH | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}),
    ]
    for way in ways:
        assert way is not None and way == ways[0] and way.name == "ZeRO-2"
    assert ways[0] is not None and ways[0].options["gradient_clipping"] == "auto"  # else `max_grad_norm` has no effect
    assert ways[0].options["train_micro_batch_size_per_gpu"] == "auto"


def test_a_settled_form_stays_as_it_is() -> None:
    for values in ({"deepspeed": ZERO}, fsdp(cpu_offload=True)):
        way = asked_sharding(values)
        assert way is not None
        again = {"deepspeed": way.options} if way.kind == "deepspeed" else {"fsdp": True, "fsdp_config": way.options}
        assert asked_sharding(again) == way


def test_what_is_given_is_not_changed() -> None:
    given = {"zero_optimization": {"stage": 2}, "bf16": {}}
    asked_sharding({"deepspeed": given})
    assert given == {"zero_optimization": {"stage": 2}, "bf16": {}}


def test_a_launcher_and_a_run_that_contradict_each_other() -> None:
    with pytest.raises(ShardingError, match=r"together \(deepspeed from accelerate's launcher\)"):
        asked_sharding({"fsdp": True}, TWO | ZERO_LAUNCH)
    with pytest.raises(ShardingError, match="give different configurations"):
        asked_sharding(zero(3), TWO | ZERO_LAUNCH)
    assert asked_sharding(zero(2), TWO | ZERO_LAUNCH) == asked_sharding(zero(2))


def test_one_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ShardingError, match="this is the only one. Start them with `torchrun"):
        asked_sharding({"fsdp": True}, {})
    with pytest.raises(ShardingError, match="needs a launcher"):
        asked_sharding(zero(), {})


@pytest.mark.parametrize("optim", OPTIMIZERS["fsdp"])
def test_optimizers_that_update_each_weight_alone_are_taken(optim: str) -> None:
    assert asked_sharding({"fsdp": True, "optim": optim}) is not None


def test_without_a_wish_nothing_is_sharded() -> None:
    assert asked_sharding({"fsdp": False, "deepspeed": None, "optim": "adafactor"}, {}) is None


def test_the_type_that_a_launcher_asks_for() -> None:
    bf16, fp8 = {"ACCELERATE_MIXED_PRECISION": "bf16"}, {"ACCELERATE_MIXED_PRECISION": "fp8"}
    assert settle_precision(None, False, bf16) is True
    assert settle_precision(None, False, {"ACCELERATE_MIXED_PRECISION": "no"}) is None
    assert settle_precision(False, True, {"ACCELERATE_MIXED_PRECISION": "fp16"}) is False
    for given, environment in ((False, bf16), (None, fp8)):
        with pytest.raises(ValueError, match="accelerate's launcher says `mixed_precision: "):
            settle_precision(given, False, environment)


def test_options_that_are_no_mapping() -> None:
    with pytest.raises(ValueError, match="wanted: a mapping, or the path"):
        read_options("deepspeed", 3)
    with pytest.raises(ValueError, match="holds no JSON object|there is no such file"):
        read_options("deepspeed", "[1]")
