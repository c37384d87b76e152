"""Run by torchrun with two processes and by plain Python with one: runs that write their record, killed and resumed."""

import os
import sys
from pathlib import Path

from transformers import TrainerCallback

from support.training import dataset, trainer

STEPS = 6
BASE = dict(run_folder=True, max_steps=STEPS, save_steps=2, save_strategy="steps", overwrite_output_dir=False)
CASES = {
    "plain": dict(),
    "ahead": dict(max_staleness=1),
    "resampled": dict(resample_rounds=1),
    "some": dict(log_completions=3),
}


def made(out, name, processes, case):
    fields = {**BASE, **CASES[case]}
    made = trainer(out / name, train_dataset=dataset((4,) * 8), per_device_train_batch_size=4 // processes, **fields)
    assert made.accelerator.num_processes == processes
    return made


def run(out, name, processes, case, resume=None):
    made(out, name, processes, case).train(resume_from_checkpoint=resume)


def broken(out, name, processes, case):
    """One that ends after step 5, whose newest checkpoint is that of step 4."""
    one = made(out, name, processes, case)
    one.add_callback(StopsAtFive())
    one.train()


class StopsAtFive(TrainerCallback):
    """Ends a run without a checkpoint of its last step, as a kill does, but for what torchrun makes of one."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            control.should_training_stop, control.should_save = True, False


def main(out, what):
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if what == "runs":
        for case in CASES:
            run(out, f"{case}-whole-{processes}", processes, case)
            broken(out, f"{case}-resumed-{processes}", processes, case)
            broken(out, f"{case}-moved-{processes}", processes, case)
            run(out, f"{case}-resumed-{processes}", processes, case, resume=True)
    else:  # runs of the other number of processes go on
        for case in CASES:
            run(out, f"{case}-moved-{3 - processes}", processes, case, resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
