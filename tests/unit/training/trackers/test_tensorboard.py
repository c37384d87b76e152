"""What TensorBoard is given, read back from its files."""

import pytest
from transformers import TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from online_dpo.training.samples import PairSample, Samples
from online_dpo.training.trackers.tensorboard import TensorBoardTracker, pairs_table


def test_markdown_and_html_of_a_model_stay_text():
    text = "a|b\n![x](http://example.com) <script>*bold*"
    hostile = PairSample(1, "1-0-0-0", text, "", "", None, None, 1.0, "")
    [row] = pairs_table([hostile]).splitlines()[2:]
    assert not set("<>*[]()!") & set(row.replace("<br>", "")) and row.count("|") == 10


def test_a_run_that_goes_on_writes_into_its_folder_and_hides_later_steps(tmp_path):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    args, callback = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]), TensorBoardCallback()
    tracker = TensorBoardTracker(callback)
    tracker.go_on("logs", args, TrainerState(global_step=0), None)
    for step in (1, 2):
        tracker.show(Samples(step, {"score": [float(step), 2.0]}))
    callback.tb_writer.close()
    assert tracker.run(args) == "logs"
    again = TensorBoardTracker(TensorBoardCallback())
    again.go_on("logs", args, TrainerState(global_step=1), None)
    again.show(Samples(2, {"score": [7.0, 8.0, 9.0]}))
    read = tensorboard.EventAccumulator(str(tmp_path / "logs"), {"histograms": 0})
    read.Reload()
    shown = [(event.step, event.histogram_value.num) for event in read.Histograms("samples/score")]
    assert shown == [(1, 2.0), (2, 3.0)]
