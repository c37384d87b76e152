"""Events reach those who listen, once."""

import logging
import threading

from online_dpo.runs import events
from online_dpo.runs.often import OftenTold
from support.processes import run_python


def test_without_a_listener_nothing_happens():
    events.emit("skip", "nobody listens")


def test_listeners_hear_what_is_said_while_they_listen():
    heard = []
    with events.listening(heard.append):
        events.emit("skip", "first", step=3)
        with events.listening(heard.append):
            events.emit("idle")
    events.emit("skip", "later")
    assert heard == [events.Event("skip", "first", {"step": 3}), events.Event("idle"), events.Event("idle")]


def test_warnings_of_a_logger_are_events_but_those_that_are_one_already():
    heard, logger = [], logging.getLogger("online_dpo.some.module")
    with events.listening(heard.append), events.warnings_told("online_dpo"):
        logger.warning("%s is away", "it")
        logger.info("not this")
        events.warn(logger, "out_of_memory", "a pass did not fit", pairs=2)
        logging.getLogger("another").warning("nor this")
    logger.warning("nor this")
    assert [(event.kind, event.message) for event in heard] == [
        ("warning", "it is away"),
        ("out_of_memory", "a pass did not fit"),
    ]


def test_a_listener_may_warn_under_a_lock_of_its_own_while_another_thread_warns():
    """As the run folder does, when it cannot be written."""
    lock, logger, arrived = threading.RLock(), logging.getLogger("online_dpo.part"), threading.Event()

    def listener(event):
        arrived.set()
        with lock:
            pass

    def warn():
        with lock:
            threading.Thread(target=logger.warning, args=("of another thread",), daemon=True).start()
            arrived.wait(10)
            events.warn(logger, "record", "of the listener")

    with events.listening(listener), events.warnings_told("online_dpo"):
        warning = threading.Thread(target=warn, daemon=True)
        warning.start()
        warning.join(10)
        assert not warning.is_alive()


def test_what_comes_often_is_told_at_once_and_then_counted():
    heard, often = [], OftenTold(pause=3600.0)
    with events.listening(heard.append):
        for attempt in range(5):
            often.tell("retry", "judge", f"attempt {attempt}")
        often.tell("retry", "reward", "another source")
        often.flush()
        often.flush()
    told = [(event.message, event.facts["times"]) for event in heard]
    assert told == [("attempt 0", 1), ("another source", 1), ("attempt 4", 4)]


def test_what_comes_seldom_is_told_each_time():
    heard, often = [], OftenTold(pause=0.0)
    with events.listening(heard.append):
        for attempt in range(3):
            often.tell("retry", "judge", f"attempt {attempt}")
    assert [event.facts["times"] for event in heard] == [1, 1, 1]


SHOWN = """
import logging
from online_dpo.runs import events

logger = logging.getLogger("online_dpo.part")
logger.warning("before")
with events.warnings_told("online_dpo"), events.warnings_told("online_dpo"):
    logger.warning("inside")
    events.warn(logger, "skip", "an event")
    logging.basicConfig(format="root: %(message)s")
    logger.warning("with a handler")
"""


def test_warnings_are_shown_as_without_a_listener():
    """Python shows those that no handler takes; ours must not count as one."""
    done = run_python("-c", SHOWN)
    assert done.stderr.splitlines() == ["before", "inside", "an event", "root: with a handler"]
