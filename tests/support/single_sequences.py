"""Log-probabilities one sequence at a time, which those of rows are compared with, and the groups to compare on."""

import torch

from online_dpo.modeling.logprobs import enable_logprobs, row_logprobs
from support import tiny

COMPLETIONS = [[[5, 6, 7, 1], [8, 9], [8, 9, 30]], [[10, 11, 12, 13, 14, 1], [15, 1], [16]], [[1], [20, 21, 22], [23]]]
LENGTHS = (9, 2, 14)


def groups():
    return [tiny.group(p, c) for p, c in zip(tiny.prompts(LENGTHS), COMPLETIONS, strict=True)]


def ready(model):
    enable_logprobs(model)
    return model


def alone(model, prompt, completion):
    """The oracle: one sequence, no padding, no mask, no positions, whole log-softmax in double."""
    ids = torch.tensor([[*prompt, *completion]])
    logps = model(input_ids=ids).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
    entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, torch.tensor(completion)[:, None])[:, 0], entropy


def oracle(model, made):
    both = [alone(model, g.prompt.token_ids, c.token_ids) for g in made for c in g.completions]
    return torch.cat([logps for logps, _ in both]).float(), torch.cat([entropy for _, entropy in both]).float()


def assert_equals_oracle(model, rows, made, chunked):
    got = row_logprobs(model, rows, chunked=chunked)
    logps, entropy = oracle(model, made)
    torch.testing.assert_close(got.token_logps_M, logps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.entropy_M, entropy, atol=1e-5, rtol=1e-5)
    sums = torch.stack([part.sum() for part in logps.split(rows.length_S.tolist())])
    torch.testing.assert_close(got.logps_S, sums, atol=1e-4, rtol=1e-5)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weighted(token_logps_M):
    """A different factor for each token, so that no error cancels."""
    return (token_logps_M * torch.linspace(-1.0, 2.0, len(token_logps_M))).sum()
