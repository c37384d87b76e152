"""A trainer and two workers, as threads that each have a store connection and a gloo group of their own."""

import socket
import time

import pytest
import torch

from online_dpo.rollout.weights import process_group
from online_dpo.rollout.weights.process_group import Rendezvous, TransferStopped, into_buckets, offsets, pack
from support.weight_transfers import CPU, SECRET, receive, send, weights


def transfer(threads, server, name, held=(None, None, None), tensors=None):
    sender = threads.submit(send, server, name, held[0], tensors)
    receivers = [threads.submit(receive, server, name, rank, held[rank]) for rank in (1, 2)]
    answers = [receiver.result() for receiver in receivers]
    return [sender.result(), *(group for group, _ in answers)], [received for _, received in answers]


@pytest.mark.parametrize("bucket_bytes", [1, 200, 1 << 20])
def test_all_workers_receive_all_weights_whatever_the_buckets(server, threads, monkeypatch, bucket_bytes):
    monkeypatch.setattr(process_group, "BUCKET_BYTES", bucket_bytes)
    groups, received = transfer(threads, server, "one")
    for copy in received:
        assert list(copy) == [name for name, _ in weights()]
        for name, tensor in weights():
            assert copy[name].dtype == tensor.dtype and torch.equal(copy[name], tensor)
    for group in groups:
        group.close()


def test_a_group_is_kept_and_formed_anew_when_a_worker_has_lost_it(server, threads):
    first, _ = transfer(threads, server, "one")
    kept, received = transfer(threads, server, "two", first, weights(1))
    assert all(a is b for a, b in zip(first, kept, strict=True))
    assert received[0]["scalar"] == received[1]["scalar"] == 1.5
    anew, received = transfer(threads, server, "three", (kept[0], kept[1], None), weights(2))
    assert {group.name for group in anew} == {"three"}
    assert received[0]["scalar"] == received[1]["scalar"] == 2.5
    for group in anew:
        group.close()


def test_one_that_fails_stops_the_others_at_once(server, threads):
    def failing():
        yield from weights()[:2]
        raise ValueError("no more weights")

    sender = threads.submit(send, server, "one", None, failing(), 30.0)
    receivers = [threads.submit(receive, server, "one", rank, None, 30.0) for rank in (1, 2)]
    started = time.monotonic()
    with pytest.raises(ValueError, match="no more weights"):
        sender.result()
    for receiver in receivers:
        with pytest.raises(TransferStopped, match="the trainer gave up: no more weights|failed"):
            receiver.result()
    assert time.monotonic() - started < 25  # not their time limit


def test_no_process_waits_longer_than_the_time_limit(server, threads):
    sender = threads.submit(send, server, "one", None, None, 1.0)
    receiver = threads.submit(receive, server, "one", 1, None, 1.0)  # the other never comes
    started = time.monotonic()
    for member in (sender, receiver):
        with pytest.raises(TransferStopped, match="waiting for .* took longer than `vllm_server_timeout`, 1 seconds"):
            member.result()
    assert time.monotonic() - started < 30


def test_a_trainer_that_cannot_be_reached_is_told_of_with_its_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(TransferStopped, match=f"port {port} cannot be reached at 127.0.0.1.*`vllm_group_port`"):
        Rendezvous.join("127.0.0.1", port, SECRET, "one", 0.5)


def test_buckets_hold_whole_weights_up_to_their_size():
    sizes = [[tensor.nbytes for _, tensor in bucket] for bucket in into_buckets(weights(), 200)]
    assert sizes == [[4800], [140, 30, 7, 16, 4, 0, 3]]
    assert [b for bucket in into_buckets(weights(), 1) for b, _ in bucket] == [name for name, _ in weights()]


def test_weights_lie_at_multiples_of_the_alignment():
    starts, total = offsets([torch.zeros(7, dtype=torch.uint8), torch.zeros(3), torch.zeros(2, dtype=torch.float64)])
    assert (starts, total) == ([0, 16, 32], 48)


def test_a_large_weight_is_sent_from_where_it_lies():
    tensor = torch.nn.Parameter(torch.randn(30, 20))
    assert pack([tensor], CPU).data_ptr() == tensor.data_ptr()
    assert pack([tensor.T], CPU).data_ptr() != tensor.data_ptr()
    assert torch.equal(pack([tensor.T], CPU).view(torch.float32).view(20, 30), tensor.detach().T)
