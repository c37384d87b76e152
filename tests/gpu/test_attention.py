"""FlexAttention and SDPA over rows that share prompts, forward and backward, by value; and the memory that they take.

Tolerances, as norms of differences relative to norms. In fp32 (24 bits) a row of a thousand scores is summed to about
1e-6; a wrong mask or scale changes outputs by 0.1 and more, so 1e-4 tells them apart. In bf16 (8 bits) inputs, weights
of attention and outputs are rounded by up to 2^-9 each, a few of them in turn: 1 % forward, 2 % backward.
"""

from types import SimpleNamespace

import pytest
import torch

from online_dpo.modeling.attention import flex
from online_dpo.modeling.attention.masks import use_flex_attention, visible_mask
from online_dpo.modeling.logprobs import enable_logprobs, row_logprobs
from online_dpo.packing.pack import pack_groups
from online_dpo.types import TokenRows
from support import tiny
from support.on_gpu import in_fp64, logprobs_alone, model, relative

FORWARD = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
BACKWARD = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
HEADS, KEYS, SIZE = 8, 2, 64
REACHES = [(None, None), (100, None), (None, 128)]


def forest(rows, length, device, seed=0):
    """Rows of trees of random sizes, each a prompt and two completions, with padding at the end of the second row."""
    generator = torch.Generator().manual_seed(seed)

    def size(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    columns = {name: [] for name in ("positions", "tree", "branch")}
    for row in range(rows):
        of_row, tree = {name: [] for name in columns}, 0
        end = length - (length // 5 if row == 1 else 0)
        while len(of_row["tree"]) < end:
            prompt = size(5, 120)
            for branch, count in enumerate((prompt, size(1, 90), size(1, 90))):
                start = 0 if branch == 0 else prompt
                of_row["positions"] += range(start, start + count)
                of_row["tree"] += [tree] * count
                of_row["branch"] += [branch] * count
            tree += 1
        for name, padding in (("positions", 0), ("tree", -1), ("branch", 0)):
            columns[name].append(of_row[name][:end] + [padding] * (length - end))
    made = {name: torch.tensor(values, device=device) for name, values in columns.items()}
    ids_RT = torch.zeros_like(made["tree"])
    return TokenRows(ids_RT, made["positions"], made["tree"], made["branch"], shares_prompts=True)


def inputs(rows, length, device, dtype, seed=1):
    """Queries, keys, values, and the gradient of what attention gives."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads, length, SIZE) for heads in (HEADS, KEYS, KEYS)] + [(rows, length, HEADS, SIZE)]
    made = [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]
    return [x.requires_grad_() for x in made[:3]], made[3]


def by_definition(query, key, value, visible_RTT):
    """Attention by its definition, in fp64."""
    key, value = (x.repeat_interleave(HEADS // KEYS, dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2)) / SIZE**0.5
    weights = scores.masked_fill(~visible_RTT[:, None], float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2)


def expected(given, grad, tokens, window, chunk):
    """What attention gives by its definition, and the gradients of its inputs. Padding has no gradient."""
    exact = [x.detach().double().requires_grad_() for x in given]
    output = by_definition(*exact, visible_mask(tokens, window, chunk))
    output.backward(grad.double())
    return output.detach(), [x.grad for x in exact]


def of_flex(given, mask):
    module = SimpleNamespace(num_key_value_groups=HEADS // KEYS, training=True, is_causal=True)
    return flex.attention(module, *given, mask, scaling=SIZE**-0.5)[0]


def without_padding(grad, tokens):
    return grad * (tokens.tree_RT != -1)[:, :, None, None]


@pytest.mark.parametrize("window, chunk", REACHES)
@pytest.mark.parametrize("length", [256, 640, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_forward_and_backward(dtype, length, window, chunk, device):
    if device.type == "cpu":
        length = 256
    tokens = forest(2, length, device, seed=length)
    given, grad = inputs(2, length, device, dtype)
    grad = without_padding(grad, tokens)
    right, gradients = expected(given, grad, tokens, window, chunk)
    real = tokens.tree_RT != -1
    if device.type == "cpu":  # FlexAttention has no backward pass there
        output = of_flex([x.detach() for x in given], flex.block_mask(tokens, window, chunk))
        assert relative(output[real], right[real]) < FORWARD[dtype]
        return
    output = of_flex(given, flex.block_mask(tokens, window, chunk))
    assert output.dtype == dtype and output.isfinite().all()
    assert relative(output[real], right[real]) < FORWARD[dtype]
    output.backward(grad)
    for name, x, right_one in zip(("query", "key", "value"), given, gradients, strict=True):
        assert x.grad.isfinite().all() and relative(x.grad, right_one) < BACKWARD[dtype], name


def test_many_lengths_and_kinds_of_masks_stay_fused(card):
    """After too many compilations Dynamo runs a function as it is, which materialises all scores: 256 MiB here."""
    for number, length in enumerate((128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536)):
        for window, chunk in REACHES:
            for rows in (1, 2):
                tokens = forest(rows, max(length, 256), card, seed=number)
                given, grad = inputs(rows, max(length, 256), card, torch.bfloat16)
                of_flex(given, flex.block_mask(tokens, window, chunk)).backward(without_padding(grad, tokens))
    length = 4096
    tokens = forest(1, length, card)
    given, grad = inputs(1, length, card, torch.bfloat16)
    mask = flex.block_mask(tokens, None, None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    of_flex(given, mask).backward(grad)
    torch.cuda.synchronize()
    scores = HEADS * length * length * 2
    assert torch.cuda.max_memory_allocated() - before < scores / 3


def some_groups(seed=0):
    """Groups with completions of many lengths, the third of them longer than a block."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [(9, (5, 40)), (64, (1, 17)), (150, (200, 3)), (2, (30, 31))]
    prompts = tiny.prompts([prompt for prompt, _ in lengths], seed)
    return [
        tiny.group(prompt, [torch.randint(4, tiny.VOCABULARY, (n,), generator=generator).tolist() for n in sizes])
        for prompt, (_, sizes) in zip(prompts, lengths, strict=True)
    ]


def factors(count, device):
    """A different factor for each token, so that no error cancels."""
    return torch.linspace(-1.0, 2.0, count, device=device)


def gradients_of(one, loss):
    one.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().double() for p in one.parameters() if p.grad is not None])


def right_values(one, made):
    """Log-probabilities of each completion alone in fp64, and the gradient of their weighted sum."""
    reference = in_fp64(one)
    device = next(reference.parameters()).device
    parts = []
    for group in made:
        for completion in group.completions:
            prompt = group.prompt.token_ids
            ids = torch.tensor([[*prompt, *completion.token_ids]], device=device)
            logps_MV = reference(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            parts.append(logps_MV.gather(-1, ids[0, len(prompt) :, None])[:, 0])
    logps_M = torch.cat(parts)
    return logps_M.detach(), gradients_of(reference, (logps_M * factors(len(logps_M), device)).sum())


@pytest.mark.parametrize("attention", ["flex", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_whole_models_in_fp32(family, attention, device):
    one, made = model(family, device), some_groups()
    right, gradient = right_values(one, made)
    enable_logprobs(one)
    if attention == "flex":
        use_flex_attention(one)
    rows = pack_groups(made, [], True, 1024).to(device)
    if attention == "flex" and device.type == "cpu":
        with torch.no_grad():
            logps_M = row_logprobs(one, rows).token_logps_M
        torch.testing.assert_close(logps_M.double(), right, atol=1e-4, rtol=1e-4)
        return
    logps_M = row_logprobs(one, rows).token_logps_M
    torch.testing.assert_close(logps_M.double(), right, atol=1e-4, rtol=1e-4)
    found = gradients_of(one, (logps_M * factors(len(logps_M), device)).sum())
    assert relative(found, gradient) < 1e-3  # deep sums of factors of both signs, which cancel


@pytest.mark.parametrize("attention", ["flex", "sdpa", "one completion a row"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_whole_models_in_bf16_are_as_near_to_fp64_as_single_sequences(family, attention, device):
    """Single sequences under autocast are the measure: no packing, no mask of ours, the model's own head."""
    one, made = model(family, device, sharpness=1.0), some_groups()
    right, gradient = right_values(one, made)
    with torch.autocast(device.type, torch.bfloat16):
        alone = torch.cat([logprobs_alone(one, g.prompt.token_ids, c.token_ids) for g in made for c in g.completions])
    enable_logprobs(one)
    if attention == "flex":
        use_flex_attention(one)
    shared = attention != "one completion a row"
    rows = pack_groups(made, [], shared, 1024 if shared else 0).to(device)
    backward = attention != "flex" or device.type == "cuda"
    with torch.autocast(device.type, torch.bfloat16), torch.set_grad_enabled(backward):
        logps_M = row_logprobs(one, rows).token_logps_M
    assert logps_M.dtype == torch.float32
    found, measure = (logps_M.detach().double() - right).abs(), (alone.to(device) - right).abs()
    assert float(found.mean()) <= 2 * float(measure.mean()) + 1e-3
    assert float(found.max()) <= 3 * float(measure.max()) + 1e-2
    if backward:
        found = gradients_of(one, (logps_M * factors(len(logps_M), device)).sum())
        # bf16 in each of some twenty products in turn: 2^-9 each, which add up like independent errors
        assert relative(found, gradient) < 5e-2
