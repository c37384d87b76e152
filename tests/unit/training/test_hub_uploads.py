"""A push to the hub holds the model, and nothing of what was trained on."""

from fnmatch import fnmatch

from transformers import trainer

from online_dpo.training.hub_uploads import without_record


class Api:
    """What is asked of the hub."""

    def __init__(self):
        self.asked = []

    def upload_folder(self, **options):
        self.asked.append(options)

    def create_repo(self, name):
        return f"made {name}"


def test_the_record_is_left_out_and_all_else_is_as_it_was(monkeypatch):
    api = Api()
    monkeypatch.setattr(trainer, "hf_api", lambda: api)
    before = trainer.hf_api
    with without_record():
        trainer.hf_api().upload_folder(folder_path="out", ignore_patterns=["_*"])
        trainer.hf_api().upload_folder(folder_path="out/checkpoint-2")
        assert trainer.hf_api().create_repo("x") == "made x"
    assert trainer.hf_api is before
    names = ("metrics.jsonl", "events.jsonl", "environment.json", "run.yaml", "run.resolved.yaml", "votes.jsonl")
    for asked in api.asked:
        for name in (
            *names,
            "questions.jsonl",
            "report.html",
            "completions-r12-00003.jsonl.zst",
            "earlier/1/events.jsonl",
        ):
            assert any(fnmatch(name, pattern) for pattern in asked["ignore_patterns"]), name
        for name in ("model.safetensors", "README.md", "tokenizer.json", "config.json", "training_args.bin"):
            assert not any(fnmatch(name, pattern) for pattern in asked["ignore_patterns"]), name
    assert "_*" in api.asked[0]["ignore_patterns"]


def test_the_trainer_uploads_through_what_is_replaced():
    """`transformers.Trainer` looks the interface up in its module, both when it pushes and from checkpoints."""
    names = (trainer.Trainer.push_to_hub, trainer.Trainer._push_from_checkpoint)
    assert all("hf_api" in method.__code__.co_names for method in names)
