"""generate.py against transformers' generate, against scoring, and by its own statistics."""
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import QwenVL
from played_device import PlayedDevice
from qwen import generate as sampling
from qwen.attention import Cache
from qwen.generate import draw, generate, unfinished, uniform
from qwen.hub import FAMILIES
from test_model import IMAGE, MARKERS, PROMPTS, Pair, random_checkpoint, relative


@pytest.fixture(scope="module", params=FAMILIES.values())
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = tmp_path_factory.mktemp("checkpoint")
    theirs = random_checkpoint(path, family=request.param)
    return QwenVL.from_pretrained(path, dtype=torch.float32), theirs


def greedy_of_transformers(theirs: Any, prompt: Any, max_new_tokens: int) -> list[int]:
    """The ids that transformers' generate appends to a prompt."""
    ids = prompt.input_ids[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    if len(prompt.pixel_values):
        inputs["pixel_values"] = prompt.pixel_values
        inputs["image_grid_thw"] = prompt.image_grid_thw
    out = theirs.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=17,
        pad_token_id=0, suppress_tokens=MARKERS)
    return out[0, len(prompt.input_ids):].tolist()


def test_greedy_tokens_equal_transformers_generate(pair: Pair) -> None:
    model, theirs = pair
    seeds = torch.zeros(3, dtype=torch.long)
    tokens, _, lengths = generate(model, PROMPTS, 1, 24, 0.0, seeds)
    for prompt, got, n in zip(PROMPTS, tokens[:, 0], lengths[:, 0]):
        assert got[:n].tolist() == greedy_of_transformers(theirs, prompt, 24)


def rollouts(tokens: Tensor, lengths: Tensor) -> list[list[Tensor]]:
    """(Q, G, L) and (Q, G) -> each rollout without its padding."""
    return [unpadded(group, ns) for group, ns in zip(tokens, lengths)]


def unpadded(rows: Tensor, lengths: Tensor) -> list[Tensor]:
    return [row[:n] for row, n in zip(rows, lengths)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_log_probabilities_are_the_scored_ones(
        pair: Pair, temperature: float) -> None:
    model, _ = pair
    seeds = torch.tensor([5, 6, 7])
    tokens, logprobs, lengths = generate(model, PROMPTS, 6, 40, temperature, seeds)
    with torch.no_grad():
        scored, _ = model.score(PROMPTS, rollouts(tokens, lengths), temperature)
    sampled = torch.cat(unpadded(logprobs.flatten(0, 1), lengths.flatten()))
    assert torch.allclose(sampled, scored, atol=1e-4)
    padding = torch.arange(tokens.shape[-1]) >= lengths[..., None]
    assert (logprobs[padding] == 0).all()


def test_a_rollout_does_not_depend_on_its_batch(pair: Pair) -> None:
    model, _ = pair
    tokens, _, lengths = generate(model, PROMPTS, 4, 30, 1.0, torch.tensor([1, 2, 3]))
    for q in range(3):
        seed = torch.tensor([q + 1])
        alone, _, alone_lengths = generate(model, PROMPTS[q:q + 1], 4, 30, 1.0, seed)
        assert torch.equal(alone_lengths[0], lengths[q])
        assert torch.equal(alone[0], tokens[q, :, :alone.shape[-1]])
    fewer, _, _ = generate(model, PROMPTS, 2, 30, 1.0, torch.tensor([1, 2, 3]))
    assert torch.equal(fewer, tokens[:, :2, :fewer.shape[-1]])
    other_seeds, _, _ = generate(model, PROMPTS, 4, 30, 1.0, torch.tensor([11, 12, 13]))
    assert not torch.equal(other_seeds, tokens)
    # No two rollouts are the same.
    assert len({tuple(t.tolist()) for t in tokens.flatten(0, 1)}) == 12


def test_rollouts_end_with_a_stop_token_and_leave_the_batch(
        pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many stop ids, so that rollouts end at all lengths: the batch that shrinks gives
    what the batch that never shrinks gives."""
    model, _ = pair
    seeds = torch.tensor([1, 2, 3])
    batch_sizes = []
    decode = model.decode

    def watched_decode(tokens: Tensor, *rest: Any) -> Tensor:
        batch_sizes.append(len(tokens))
        return decode(tokens, *rest)

    monkeypatch.setattr(model, "stop_ids", tuple(range(60)))
    monkeypatch.setattr(model, "decode", watched_decode)
    monkeypatch.setattr(sampling, "CHECK_EVERY", 2)
    tokens, logprobs, lengths = generate(model, PROMPTS, 8, 40, 1.0, seeds)
    assert batch_sizes[-1] < batch_sizes[0] == 24
    monkeypatch.setattr(sampling, "CHECK_EVERY", 1000)
    plain_tokens, plain_logprobs, plain_lengths = generate(model, PROMPTS, 8, 40, 1.0, seeds)
    assert torch.equal(tokens, plain_tokens) and torch.equal(lengths, plain_lengths)
    assert relative(logprobs, plain_logprobs) < 1e-5
    for rollout in unpadded(tokens.flatten(0, 1), lengths.flatten()):
        assert (rollout[:-1] >= 60).all()
        assert rollout[-1] < 60 or len(rollout) == 40


def test_banned_ids_are_never_sampled_however_likely(pair: Pair) -> None:
    model, _ = pair
    seeds = torch.tensor([1, 2, 3])
    with torch.no_grad():
        saved = model.lm_head.weight.clone()
        model.lm_head.weight[MARKERS] = 40 * model.lm_head.weight[60:64]
        sampled, _, _ = generate(model, PROMPTS, 8, 20, 3.0, seeds)
        greedy, _, _ = generate(model, PROMPTS, 1, 20, 0.0, seeds)
        model.lm_head.weight.copy_(saved)
    for tokens in (sampled, greedy):
        assert not torch.isin(tokens, torch.tensor(MARKERS)).any()


def test_draw_inverts_the_distribution() -> None:
    logp = torch.tensor([0.5, 0.0, 0.25, 0.25, 0.0]).log()
    u = torch.tensor([0.0, 0.4999, 0.5001, 0.7499, 0.7501, 1 - 2.0 ** -52], dtype=torch.double)
    # Never an id without probability.
    assert draw(logp.expand(6, 5), u).tolist() == [0, 0, 2, 2, 3, 3]


def test_uniform_numbers_are_uniform_and_independent() -> None:
    n = 100_000
    count = torch.arange(n)
    zeros = torch.zeros(n, dtype=torch.long)
    for seeds, places, k in [(count, zeros, 0), (zeros, count, 3)]:
        u = uniform(seeds, places, k)
        assert 0 <= u.min() and u.max() < 1
        assert (u.histc(50, 0, 1) - n / 50).abs().max() < 5 * (n / 50) ** 0.5
        following = uniform(seeds, places, k + 1)
        assert abs(torch.corrcoef(torch.stack((u, following)))[0, 1]) < 0.02
    assert torch.equal(u, uniform(zeros, count, 3))


def test_unfinished_keeps_the_rollouts_that_go_on() -> None:
    done = torch.tensor([
        [True, False, True, False], [True, True, True, True], [True, True, False, True]])
    # Question 1 is finished; 8 is a filler next to 10.
    assert unfinished(done, 0.75).tolist() == [[1, 3], [10, 8]]
    assert unfinished(torch.zeros(2, 4, dtype=torch.bool), 0.75) is None
    assert unfinished(torch.ones(2, 4, dtype=torch.bool), 0.75).numel() == 0


# ------------------------------------------------------------------- counted on a played GPU

SOME = tuple(range(10))           # ids that stop a rollout now and then
NONE = (MARKERS[0],)              # an id that is never sampled


def on_gpu(
        path: Path, tokens: int, stop_ids: tuple[int, ...] = NONE,
        cuda_graphs: bool = False) -> PlayedDevice:
    """What a played GPU counts while 64 rollouts of 8 prompts are sampled in bfloat16."""
    with PlayedDevice() as gpu:
        model = QwenVL.from_pretrained(path, torch.bfloat16, "cuda")
        model.stop_ids = stop_ids
        gpu.syncs.clear()
        gpu.launches_by_name.clear()
        generate(model, PROMPTS[1:] * 4, 8, tokens, 1.0, torch.arange(8), cuda_graphs)
    return gpu


def launches_a_step(path: Path, layers: int, family: str) -> Counter:
    """Kernels of one more token."""
    random_checkpoint(path, family=family, num_hidden_layers=layers)
    return on_gpu(path, 4).launches_by_name - on_gpu(path, 3).launches_by_name


@pytest.mark.parametrize("family", FAMILIES.values())
def test_a_layer_decodes_in_forty_launches(tmp_path: Path, family: str) -> None:
    of_four = launches_a_step(tmp_path / "4", 4, family)
    layer = of_four - launches_a_step(tmp_path / "3", 3, family)
    assert 20 < layer.total() <= 40, layer


@pytest.mark.parametrize("family", FAMILIES.values())
def test_sampling_waits_for_the_host_forty_times(tmp_path: Path, family: str) -> None:
    """256 tokens for 64 rollouts: once at each look at who has finished, all to the end."""
    random_checkpoint(tmp_path, family=family)
    gpu = on_gpu(tmp_path, 256)
    assert 256 // sampling.CHECK_EVERY <= gpu.syncs.total() <= 40, gpu.syncs


def test_a_graph_is_captured_once_for_each_batch_size(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens; and a batch that shrinks waits no oftener than one that does not."""
    random_checkpoint(tmp_path)
    gpu = on_gpu(tmp_path, 100, cuda_graphs=True)
    assert (gpu.captures, gpu.replays) == (1, 99)
    shrunk = []
    select = Cache.select

    def watched_select(cache: Cache, questions: Tensor, rollouts: Tensor) -> None:
        select(cache, questions, rollouts)
        shrunk.append(len(rollouts))

    monkeypatch.setattr(Cache, "select", watched_select)
    shrinking = on_gpu(tmp_path, 100, SOME, cuda_graphs=True)
    assert shrunk and shrinking.captures == 1 + len(shrunk)
    assert shrinking.syncs.total() <= gpu.syncs.total()
