"""Notebooks, run by a real kernel: what one shows of a run, an evaluation and a stop, and the one in examples/."""

import re
import sys
from pathlib import Path

import pytest

from online_dpo.quickstart.artifacts import build
from online_dpo.quickstart.models import TINY
from support.processes import PATHS, environment

pytest.importorskip("ipykernel")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

EXAMPLE = Path(__file__).parents[2] / "examples" / "online_dpo_in_ten_minutes.ipynb"

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


def execute(notebook, folder, **options):
    """Run all cells in a folder."""
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": sys.executable}
    # with this variable a kernel keeps what processes write to its files for itself
    own = environment(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    own.pop("PYTEST_CURRENT_TEST", None)
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where, **options).execute(env=own)


@pytest.mark.e2e
def test_a_notebook_sees_reward_kl_evaluations_and_where_it_was_stopped(tmp_path):
    first = CELLS[0].format(paths=list(PATHS), folder=str(tmp_path / "run"))
    cells = [first, *CELLS[1:]]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    execute(notebook, tmp_path, allow_errors=True)
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


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.e2e
def test_the_example_runs_from_its_first_cell_to_its_last(tmp_path):
    """With models that know next to nothing, and in two steps; all else as it is."""
    build(tmp_path / "runs/quickstart/start", size=TINY)
    notebook = nbformat.read(EXAMPLE, 4)
    code_cells(notebook)[0].source = "STEPS, LOG, HELD_OUT = 2, 1, 4"
    execute(notebook, tmp_path)
    shown = [str(cell.outputs) for cell in code_cells(notebook)]
    assert "<td>2</td>" in shown[4] and "'win_rate': " in shown[5] and shown[6].count("Assistant:") == 3
    assert "right_and_short" in shown[7] and (tmp_path / "runs/notebook/metrics.jsonl").is_file()


def test_the_outputs_of_the_example_are_those_of_its_cells():
    notebook = nbformat.read(EXAMPLE, 4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert all(cell.outputs for cell in cells[1:]) and "Traceback" not in str(cells)
    assert EXAMPLE.stat().st_size < 60_000 and not re.search(r"/(home|tmp|work|root)/", EXAMPLE.read_text())
