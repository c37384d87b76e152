"""What strangers put into files, and what must not get out: code that runs, secrets in files, marks in the model card.

`checks.py` asserts of every run that nothing called `owned` was made and that no file and no line holds `SECRET`.
"""

from __future__ import annotations

import json
import pickle

from faults.damage import all_of, edited_json, stopped_after, written
from faults.harness import ANY, RESUME, SECRET, Either, Fault, OneLine, Service, Survived
from support.endpoint import Answer


class Owned:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return open, ("owned", "w")


PICKLE = pickle.dumps(Owned())
FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "lookahead-0.pt", "reference.pt")
MARK = "x<script>alert(1)</script>"


def scores(body: dict, number: int) -> Answer:
    return Answer({"scores": [sum(map(ord, text)) % 101 / 101 for text in body["completions"]]})


def elsewhere(body: dict, number: int) -> Answer:
    return Answer(b"", 302, {"Location": "http://localhost:9/other"})


REWARD = """
from online_dpo.scoring import HTTPReward
words = HTTPReward("{url}", attempts=1, timeout=1.0, api_key_env="REWARD_KEY")
"""

FAULTS = [
    *(
        Fault(
            "security",
            f"code in {file} of a checkpoint",
            OneLine(2, "checkpoint-2"),
            options=dict(save_steps=1),
            trained={},
            prepare=stopped_after(2, written(f"out/checkpoint-2/{file}", PICKLE)),
            words=("--resume_from_checkpoint", "out/checkpoint-2"),
        )
        for file in FILES
    ),
    *(
        Fault(
            "security",
            f"code in {file} of a checkpoint without a manifest",
            OneLine(2, "checkpoint-2"),
            options=dict(save_steps=1),
            trained={},
            words=("--resume_from_checkpoint", "out/checkpoint-2"),
            prepare=stopped_after(
                2,
                written(f"out/checkpoint-2/{file}", PICKLE),
                lambda folder: [path.unlink() for path in folder.glob("out/*/manifest.json")] and None,
            ),
        )
        for file in FILES[:3]
    ),
    Fault("security", "a hub token in the run file", Survived(), options=dict(hub_token=SECRET)),
    Fault("security", "a hub token in the environment", Survived(), environment={"HF_TOKEN": SECRET}),
    Fault(
        "security",
        "a key of a service that answers",
        Survived(like=ANY),
        files={"feedback.py": REWARD},
        environment={"REWARD_KEY": SECRET},
        service=Service(scores, scores),
    ),
    Fault(
        "security",
        "a redirect to another host",
        OneLine(1, "redirect"),
        files={"feedback.py": REWARD},
        environment={"REWARD_KEY": SECRET},
        service=Service(elsewhere, scores),
    ),
    Fault(
        "security",
        "a secret in the address of a reward",
        OneLine(2, "address"),
        files={"feedback.py": REWARD.replace("{url}", f"http://me:{SECRET}@127.0.0.1:9/x")},
        environment={"REWARD_KEY": "y"},
    ),
    Fault(
        "security",
        "HTML in the name of the model's folder",
        Survived(like=ANY),
        options=dict(model_name_or_path=f"./{MARK.replace('/', '_')}"),
        prepare=lambda folder: (folder / "policy").rename(folder / MARK.replace("/", "_")),
    ),
    Fault(
        "security",
        "HTML in the model's config",
        Survived(like=ANY),
        prepare=edited_json("policy/config.json", lambda c: c.update(_name_or_path=MARK)),
    ),
    Fault(
        "security",
        "a chat template that runs code",
        OneLine(2, "template"),
        prepare=all_of(
            written(
                "policy/chat_template.jinja",
                "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
            ),
            written("data.jsonl", (json.dumps({"prompt": [{"role": "user", "content": "w1"}]}) + "\n") * 4),
        ),
    ),
    Fault(
        "security",
        "code in a pickle of the policy",
        OneLine(2, "policy"),
        prepare=all_of(
            lambda folder: (folder / "policy/model.safetensors").unlink(), written("policy/pytorch_model.bin", PICKLE)
        ),
    ),
    Fault(
        "security",
        "an output folder of a stranger with pickles in it",
        Either(OneLine(2, "checkpoint"), Survived()),
        prepare=all_of(*(written(f"out/checkpoint-1/{file}", PICKLE) for file in FILES)),
        words=RESUME,
    ),
]
