"""The store of a transfer answers those who know the run's secret, and tells nothing to others."""

import logging
import socket
import struct
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from online_dpo.rollout.weights import store as module
from online_dpo.rollout.weights.store import GuestStore, StoreLost, StoreServer

SECRET = "of the run"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "PROOF_SECONDS", 0.3)
    server = StoreServer([socket.create_server(("127.0.0.1", 0))], SECRET)
    yield server
    server.close()


def port_of(server):
    return server._listeners[0].getsockname()[1]


def guest(server, secret=SECRET, timeout=5.0):
    return GuestStore("127.0.0.1", port_of(server), secret, timeout)


def stranger(server):
    return socket.create_connection(("127.0.0.1", port_of(server)), 5)


def threads_of_stores():
    return sum(thread.name == "weights store" for thread in threading.enumerate())


def wait_for(condition, seconds=5.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_trainer_and_workers_see_the_same_values(server):
    one, two = guest(server), guest(server)
    one.set("a", b"\x00\xff")
    server.store.set("b", "text")
    assert (two.get("a"), two.get("b"), server.store.get("a")) == (b"\x00\xff", b"text", b"\x00\xff")
    assert (one.check(["a", "b"]), one.check(["a", "c"])) == (True, False)
    assert (one.add("n", 2), two.add("n", 3)) == (2, 5)
    assert one.delete_key("a") and not two.check(["a"])
    assert one.address == "127.0.0.1"


def test_a_value_is_waited_for_and_not_for_ever(server):
    one = guest(server)
    threading.Timer(0.1, lambda: server.store.set("late", "x")).start()
    assert one.get("late") == b"x"
    with pytest.raises(StoreLost, match="nobody has set never in time"):
        one.wait(["never"], timedelta(seconds=0.1))


def test_a_worker_with_another_secret_is_turned_away_and_told_of_once(server, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with pytest.raises(StoreLost, match="does not know the secret of this run"):
                guest(server, "guessed")
        wait_for(lambda: threads_of_stores() == 1)  # that which accepts: those of the three have ended
    told = [record.getMessage() for record in caplog.records]
    assert told == ["127.0.0.1 tried to join the transfer of weights without its secret, and was turned away"]
    guest(server).set("a", "still served")


def test_an_impostor_in_place_of_the_trainer_gets_no_worker_and_learns_no_secret():
    seen = []

    def impostor(listener):
        connection, _ = listener.accept()
        with connection:
            seen.append(connection.recv(32))
            connection.sendall(bytes(64))
            seen.append(connection.recv(1000))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=impostor, args=(listener,))
        thread.start()
        with pytest.raises(StoreLost, match="does not know the secret"):
            GuestStore("127.0.0.1", listener.getsockname()[1], SECRET, 5.0)
        thread.join(5)
    assert len(seen[0]) == 32 and seen[1] == b"" and SECRET.encode() not in seen[0]


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(64), bytes(1 << 16)])
def test_a_stranger_gets_a_question_and_no_answer(server, said):
    server.store.set("a", "private")
    with stranger(server) as connection:
        connection.sendall(said)
        heard = b""
        try:
            while piece := connection.recv(1000):
                heard += piece
        except ConnectionResetError:  # closed before all was read
            pass
    assert len(heard) in (0, 64) and b"private" not in heard
    wait_for(lambda: server._strangers == 0)


def test_a_proof_cannot_be_sent_back_or_used_again(server):
    """Whoever reflects the trainer's proof has not proved anything, and each connection has its own question."""
    with stranger(server) as first, stranger(server) as second:
        first.sendall(bytes(32))
        second.sendall(bytes(32))
        answers = [module._read(one, 64, time.monotonic() + 5) for one in (first, second)]
        assert answers[0] != answers[1]
        first.sendall(answers[0][32:])
        assert first.recv(10) == b""


def test_torchs_own_store_does_not_get_in(server):
    with pytest.raises(RuntimeError):
        TCPStore("127.0.0.1", port_of(server), None, False, timedelta(seconds=1)).set("over", "gone")
    assert not server.store.check(["over"])


def test_silent_strangers_do_not_keep_workers_out(server):
    silent = [stranger(server) for _ in range(module.MOST_STRANGERS + 5)]
    for connection in silent:
        with connection:
            assert connection.recv(1) == b""  # closed: those above the limit at once, the others after their time
    guest(server).set("a", "x")


@pytest.mark.parametrize(
    "message", [struct.pack(">I", 1 << 31), b"\x00\x00\x00\x02{}", b'\x00\x00\x00\x08["burn"]', b"\x00\x00\x00\x01["]
)
def test_a_member_that_sends_something_else_loses_its_connection_alone(server, message):
    one, other = guest(server), guest(server)
    one._connection.sendall(message)
    with pytest.raises(StoreLost):
        one.check(["a"])
    assert other.check(["a"]) is False


def test_nothing_listens_on_other_addresses(server):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port_of(server)), 5)


def test_closing_frees_the_port_and_ends_threads_and_workers(server):
    port, one = port_of(server), guest(server)
    server.close()
    with pytest.raises(StoreLost):
        one.check(["a"])
    wait_for(lambda: threads_of_stores() == 0)
    with socket.create_server(("127.0.0.1", port)):
        pass
