"""Run by torchrun: two ranks train a sharded policy that vLLM samples for, many times. Saves what each rank has.

Arguments: a folder for the results, the addresses of a server of whole weights and of one of adapters, and cases.
"""

import os
import sys
import traceback
from pathlib import Path

import torch
from torch import distributed

from online_dpo.distributed.weights import full, is_sharded
from online_dpo.rollout.vllm import colocated_engine
from support import vllm_tools
from support.training import recording, without_times
from support.vllm_training import FAMILY, train

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "distributed")]
from ranks_worker import make_forget  # noqa: E402
from sharding_worker import ways  # noqa: E402

WAYS = ("fsdp2", "zero3")
CASES = {
    "file": dict(transfer="file"),
    "broadcast": dict(transfer="broadcast", forgets=True),
    "broadcast lora": dict(transfer="broadcast", lora=True),
    "adapter": dict(transfer="auto", lora=True, adapters=True),
    "in process": {},
    "in process lora": dict(lora=True),
}


def run(whole_url, adapter_url, folder, way="", transfer=None, lora=False, adapters=False, forgets=False):
    """Trains three steps; returns logs, completions by step and row, the weights after each step, and what was on.

    Args:
        forgets: the server loses the weights of the second step before it has sampled with them.
    """
    calls, found = [], {"weights": []}
    url = adapter_url if adapters else whole_url
    if transfer is None:
        served = dict(vllm_mode="colocate")
    else:
        served = dict(vllm_mode="server", vllm_server_base_url=url, vllm_weight_transfer=transfer, vllm_group_port=0)

    def prepare(made):
        found["made"], engine = made, made.sampler.engine
        sync, generate, syncs = engine.sync, engine.generate, []

        def recorded(model, version):
            sync(model, version)
            syncs.append(version)
            found["sharded"] = is_sharded(model)
            # the gradient of a bias of keys is 0, but for rounding
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "k_proj.bias" not in n}
            found["weights"].append({name: full(parameter).clone() for name, parameter in trained.items()})

        def forgetting(*given):
            if forgets and syncs == [0, 1] and not found.get("forgot"):
                found["forgot"] = True
                if made.accelerator.is_main_process:
                    make_forget(url)
                made.accelerator.wait_for_everyone()
            return generate(*given)

        engine.sync, engine.generate = recorded, forgetting

    ranks = distributed.get_world_size() if distributed.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    log = train(
        folder,
        model=vllm_tools.lora_policy(FAMILY) if lora else None,
        prepare=prepare,
        reward=recording(calls),
        per_device_train_batch_size=6 // ranks,
        max_steps=3,
        optim="sgd",  # Adam makes large steps of small rounding errors
        learning_rate=1.0,
        sync_check_steps=1,
        **served,
        **ways(way),
    )
    made = found.pop("made")
    made.sampler.engine.close()
    names = {name.removeprefix("module.") for name, _ in made.model.named_parameters()}
    return found | {
        "log": [without_times(entry) for entry in log],
        "completions": [{(row, tuple(ids)) for _, _, ids, row in call} for call in calls],
        "checked": made.sampler.sync_check._last,
        "names": names,
    }


def main(out: Path, whole_url: str, adapter_url: str, chosen: str) -> None:
    torch.set_num_threads(1)
    options = colocated_engine.engine_options
    own = {"enforce_eager": True, "block_size": vllm_tools.BLOCK}
    colocated_engine.engine_options = lambda *given: options(*given) | own
    for way in WAYS:
        for case in chosen.split(","):
            try:
                found = run(whole_url, adapter_url, out / f"{way}-{case}", way, **CASES[case])
                torch.save(found, out / f"{way}-{case}-{distributed.get_rank()}.pt")
            except BaseException:
                print(f"CASE {way} {case} rank {os.environ.get('RANK')}", file=sys.stderr)
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)  # the other rank may wait in a collective operation


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
