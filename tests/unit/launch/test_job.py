"""What a machine has to have for a run, and which checkpoints are the run's own."""

import shutil

import pytest

from online_dpo.checkpoints.needed import Needs
from online_dpo.launch.failures import ClusterError
from online_dpo.launch.job import Job, OwnCheckpoints
from online_dpo.launch.settings import RaySettings
from online_dpo.launch.worker import Facts, own_version
from support.checkpoint_folders import whole_checkpoint


def job(folder, **settings):
    return Job(
        settings=RaySettings(train_workers=1, **settings),
        run_file=None,
        words=[],
        folder=str(folder),
        output_dir=folder,
        model="m",
        revision=None,
        trust_remote_code=False,
        paths=[],
        needs=Needs({}, 1),
        variables={"HF_TOKEN": "secret"},
    )


def test_a_machine_with_another_version_cannot_take_part(tmp_path):
    with pytest.raises(ClusterError, match="10.0.0.2 has online-dpo 0.0.1, and this machine"):
        job(tmp_path).check(Facts("n", "10.0.0.2", "0.0.1", []))


def test_a_machine_that_does_not_see_the_files_cannot_take_part(tmp_path):
    with pytest.raises(ClusterError, match="10.0.0.2 does not see /d/run.yaml, /d/policy. All machines read"):
        job(tmp_path).check(Facts("n", "10.0.0.2", own_version(), ["/d/run.yaml", "/d/policy"]))


def test_the_variables_are_not_shown(tmp_path):
    assert "secret" not in repr(job(tmp_path))


def test_a_run_goes_on_from_the_newest_whole_checkpoint_that_is_its_own(tmp_path):
    whole_checkpoint(tmp_path, 100, sequence=50)  # of an earlier run
    replaced = whole_checkpoint(tmp_path, 2, sequence=51)
    own = OwnCheckpoints(job(tmp_path))
    assert own.newest() is None
    shutil.rmtree(replaced)
    assert whole_checkpoint(tmp_path, 2, sequence=1) == own.newest()
    newest = whole_checkpoint(tmp_path, 4, sequence=2)
    whole_checkpoint(tmp_path, 6, sequence=3, without=("optimizer.pt",))
    whole_checkpoint(tmp_path, 8, manifest=False)
    assert own.newest() == newest
