"""One thread a process: on a small shared machine OpenMP's spinning costs far more than it gains."""

import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)
# a shell starts what runs in its background with Ctrl-C ignored, and nohup with SIGHUP, for all processes below it
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection(session):
    """Python 3.11 now and then fails to parse a long file when its memory is collected in the middle of that
    ("AST constructor recursion depth mismatch"): not while pytest reads the tests.
    """
    gc.disable()


def pytest_collection_finish(session):
    """What has been imported stays for good: collecting memory, as each `train()` of transformers does, looks no more
    through those million objects. That was a third of all the time of tests that train.
    """
    gc.freeze()
    gc.enable()
