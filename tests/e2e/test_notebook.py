"""A notebook, run by a real kernel: what it shows of training, of an evaluation, and of the stop button."""

import os
import re
import sys

import pytest

from support.processes import PATHS

pytest.importorskip("ipykernel")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

CELLS = (
    """
import signal, sys
sys.path[:0] = {paths!r}
from transformers import TrainerCallback
from support import training

class Stop(TrainerCallback):  # what the stop button sends
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)

def make(*callbacks):
    kwargs = {{"eval_dataset": training.dataset((3, 4)), "callbacks": list(callbacks)}}
    fields = dict(max_steps=6, logging_steps=2, eval_strategy="steps", eval_steps=3, disable_tqdm=False)
    return training.trainer({folder!r}, kwargs=kwargs, **fields)

trainer = make()
trainer.train()
""",
    "trainer.evaluate()",
    "make(Stop()).train()",
)


def lines(html):
    """The points of each chart's line."""
    return re.findall('polyline points="([^"]+)"', html)


def headings(html):
    tables = html.split("<table")[1:]
    return [[part.split("</th>")[0] for part in table.split("<th>")[1:]] for table in tables]


@pytest.mark.e2e
def test_a_notebook_sees_reward_kl_evaluations_and_where_it_was_stopped(tmp_path):
    first = CELLS[0].format(paths=list(PATHS), folder=str(tmp_path / "run"))
    cells = [first, *CELLS[1:]]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": sys.executable}
    # with this variable a kernel keeps what processes write to its files for itself
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    nbclient.NotebookClient(notebook, timeout=900, allow_errors=True).execute(env=environment)
    trained, evaluated, stopped = (cell.outputs for cell in notebook.cells)
    shown = [o.data["text/html"] for o in trained if o.output_type == "display_data" and "text/html" in o.data]
    evaluation = ["step", "loss", "reward", "kl", "win rate", "tokens", "prompts"]
    pairs = ["", "prompt", "chosen", "rejected", "why"]
    assert headings(shown[-1]) == [["step", "loss", "reward", "kl", "margin", "tok/s"], evaluation, pairs]
    charts = re.findall('aria-label="([^"]+): [^"]+ at step ([0-9]+)"', shown[-1])
    of_training, of_evaluations = [(n, s) for n, s in charts if "eval" not in n], [c for c in charts if "eval" in c[0]]
    assert of_training == [("reward", "6"), ("kl", "6"), ("loss", "6"), ("margin", "6")]
    assert ("win rate (eval)", "6") in of_evaluations and all(len(p.split()) > 1 for p in lines(shown[-1]))
    assert shown[-1].count("<td style") == 2 * 5 and "word_reward" in shown[-1]
    assert [step in shown[-1] for step in ("<td>2</td>", "<td>3</td>", "<td>6</td>")] == [True] * 3
    [table] = [o.data["text/html"] for o in evaluated if "<table" in o.get("data", {}).get("text/html", "")]
    assert headings(table) == [evaluation]
    [failure] = [o for o in stopped if o.output_type == "error"]
    assert failure.ename == "TrainingInterrupted" and "after step 4 of 6. Checkpoint: " in failure.evalue
    notes = [str(o) for o in stopped if "Stopping after this step" in str(o)]
    assert len(notes) == 2, "in the cell's own errors at once, and beside the bar"
    assert (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").is_file()
