"""generate.py beside transformers' generate, beside scoring, and by its own statistics."""
import pytest
import torch

import generate as sampling
from generate import draw, generate, unfinished, uniform
from model import QwenVL
from test_model import IMAGE, PROMPTS, random_checkpoint, relative


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    theirs = random_checkpoint(path)
    return QwenVL.from_pretrained(path, dtype=torch.float32), theirs


def test_greedy_tokens_equal_transformers_generate(pair):
    model, theirs = pair
    tokens, _, lengths = generate(model, PROMPTS, 1, 24, 0.0, torch.zeros(3, dtype=torch.long))
    for p, got, n in zip(PROMPTS, tokens[:, 0], lengths[:, 0]):
        ids = p.input_ids[None]
        images = {"pixel_values": p.pixel_values, "image_grid_thw": p.image_grid_thw} if len(p.pixel_values) else {}
        want = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == IMAGE).int(), **images,
                               max_new_tokens=24, do_sample=False, eos_token_id=17, pad_token_id=0, suppress_tokens=[290, 291, 292, 293])
        assert got[:n].tolist() == want[0, len(p.input_ids):].tolist()


def rollouts(tokens, lengths):
    return [[t[:n] for t, n in zip(group, ns)] for group, ns in zip(tokens, lengths)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_log_probabilities_are_the_scored_ones(pair, temperature):
    model, _ = pair
    tokens, logprobs, lengths = generate(model, PROMPTS, 6, 40, temperature, torch.tensor([5, 6, 7]))
    with torch.no_grad():
        scored, _ = model.score(PROMPTS, rollouts(tokens, lengths), temperature)
    sampled = torch.cat([lp[:n] for group, ns in zip(logprobs, lengths) for lp, n in zip(group, ns)])
    assert torch.allclose(sampled, scored, atol=1e-4)
    assert (logprobs[torch.arange(tokens.shape[-1]) >= lengths[..., None]] == 0).all()


def test_a_rollout_does_not_depend_on_its_batch(pair):
    model, _ = pair
    together = generate(model, PROMPTS, 4, 30, 1.0, torch.tensor([1, 2, 3]))
    for q in range(3):
        alone = generate(model, PROMPTS[q:q + 1], 4, 30, 1.0, torch.tensor([q + 1]))
        assert torch.equal(alone[2][0], together[2][q])
        assert torch.equal(alone[0][0], together[0][q, :, :alone[0].shape[-1]])
    fewer = generate(model, PROMPTS, 2, 30, 1.0, torch.tensor([1, 2, 3]))
    assert torch.equal(fewer[0], together[0][:, :2, :fewer[0].shape[-1]])
    other = generate(model, PROMPTS, 4, 30, 1.0, torch.tensor([11, 12, 13]))
    assert not torch.equal(other[0], together[0])
    assert len({tuple(t.tolist()) for t in together[0].flatten(0, 1)}) == 12            # no two rollouts are the same


def test_rollouts_end_with_a_stop_token_and_leave_the_batch(pair, monkeypatch):
    """Many stop ids, so that rollouts end at all lengths: the batch that shrinks gives what the batch that never shrinks gives."""
    model, _ = pair
    monkeypatch.setattr(model, "stop_ids", tuple(range(60)))
    sizes, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda tokens, *rest: sizes.append(len(tokens)) or decode(tokens, *rest))
    monkeypatch.setattr(sampling, "CHECK_EVERY", 2)
    tokens, logprobs, lengths = generate(model, PROMPTS, 8, 40, 1.0, torch.tensor([1, 2, 3]))
    assert sizes[-1] < sizes[0] == 24
    monkeypatch.setattr(sampling, "CHECK_EVERY", 1000)
    plain = generate(model, PROMPTS, 8, 40, 1.0, torch.tensor([1, 2, 3]))
    assert torch.equal(tokens, plain[0]) and torch.equal(lengths, plain[2]) and relative(logprobs, plain[1]) < 1e-5
    for group in rollouts(tokens, lengths):
        for t in group:
            assert (t[:-1] >= 60).all() and (t[-1] < 60 or len(t) == 40)


def test_banned_ids_are_never_sampled_however_likely(pair):
    model, _ = pair
    with torch.no_grad():
        saved = model.lm_head.weight.clone()
        model.lm_head.weight[[290, 291, 292, 293]] = 40 * model.lm_head.weight[60:64]
        tokens, _, _ = generate(model, PROMPTS, 8, 20, 3.0, torch.tensor([1, 2, 3]))
        greedy, _, _ = generate(model, PROMPTS, 1, 20, 0.0, torch.tensor([1, 2, 3]))
        model.lm_head.weight.copy_(saved)
    assert not ((tokens >= 290) & (tokens <= 293)).any() and not ((greedy >= 290) & (greedy <= 293)).any()


def test_draw_inverts_the_distribution():
    logp = torch.tensor([0.5, 0.0, 0.25, 0.25, 0.0]).log()
    u = torch.tensor([0.0, 0.4999, 0.5001, 0.7499, 0.7501, 1 - 2.0 ** -52], dtype=torch.double)
    assert draw(logp.expand(6, 5), u).tolist() == [0, 0, 2, 2, 3, 3]                    # never an id without probability


def test_uniform_numbers_are_uniform_and_independent():
    n = 100_000
    for seed, place, k in [(torch.arange(n), torch.zeros(n, dtype=torch.long), 0), (torch.zeros(n, dtype=torch.long), torch.arange(n), 3)]:
        u = uniform(seed, place, k)
        assert 0 <= u.min() and u.max() < 1
        assert (u.histc(50, 0, 1) - n / 50).abs().max() < 5 * (n / 50) ** 0.5
        v = uniform(seed, place, k + 1)
        assert abs(torch.corrcoef(torch.stack((u, v)))[0, 1]) < 0.02
    assert torch.equal(u, uniform(torch.zeros(n, dtype=torch.long), torch.arange(n), 3))


def test_unfinished_keeps_the_rollouts_that_go_on():
    done = torch.tensor([[True, False, True, False], [True, True, True, True], [True, True, False, True]])
    assert unfinished(done, 0.75).tolist() == [[1, 3], [10, 8]]               # question 1 is through; 8 is a filler beside 10
    assert unfinished(torch.zeros(2, 4, dtype=torch.bool), 0.75) is None
    assert unfinished(torch.ones(2, 4, dtype=torch.bool), 0.75).numel() == 0
