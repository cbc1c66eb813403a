"""rft.py: its objective by hand and by finite differences, a step, and the whole stage."""
import argparse
import itertools
import json
import math
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import reward
import rft
from conftest import Run
from data import load, open_image
from model import QwenVL
from qwen.answer import Frame
from qwen.processor import Processor
from readers.base import Records, UnreadableImage
from report import page
from rft import Group, advantages, policy_loss
from train import checkpoints, dist
from train import run as runtime

LogLine = dict[str, Any]
LOSSES = ("dapo", "grpo", "dr-grpo")
RATIOS = ("token", "sequence")


def answer_text(box: Sequence[float]) -> str:
    """A text in the answer format that gives this box, in the model's frame."""
    return f'<think>x</think><answer>{{"bbox_2d": {list(box)}}}</answer>'


def step_flags(**changes: Any) -> argparse.Namespace:
    """The flags of a small step without a reference."""
    flags = vars(rft.flags().parse_args([]))
    flags |= {"prompts": 4, "group": 3, "max_new_tokens": 12, "lr": 1e-4, "steps": 10}
    flags |= {"device": "cpu", "beta": 0.0}
    return argparse.Namespace(**flags | changes)


# ---------------------------------------------------------------- advantages

def test_advantages_by_hand() -> None:
    # Mean 0.5, standard deviation sqrt((0.5^2 + 0.5^2) / 1) = 0.7071.
    rewards = torch.tensor([[1.0, 0.0]])
    plain = torch.tensor([[0.5, -0.5]])
    assert torch.allclose(advantages(rewards), plain / (0.5 ** 0.5 + 1e-4))
    assert torch.allclose(advantages(rewards, divide_by_std=False), plain)


def test_the_better_rollout_has_the_positive_advantage_and_a_group_sums_to_zero() -> None:
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    advantage = advantages(rewards)
    assert (advantage.argmax(1) == rewards.argmax(1)).all() and (advantage.amax(1) > 0).all()
    assert torch.allclose(advantage.sum(1), torch.zeros(5), atol=1e-5)


def test_a_group_without_difference_has_advantage_exactly_zero() -> None:
    advantage = advantages(torch.tensor([[0.1, 0.1, 0.1], [0.3, 0.2, 0.1]]))
    assert (advantage[0] == 0).all() and (advantage[1] != 0).any()


# ---------------------------------------------------------------- the loss

@pytest.mark.parametrize("ratio, advantage, gain, clipped", [
    (2.0, 1.0, 1.3, True),        # min(2.0 * 1, 1.3 * 1)
    (2.0, -1.0, -2.0, False),     # min(2.0 * -1, 1.3 * -1)
    (0.5, 1.0, 0.5, False),       # min(0.5 * 1, 0.8 * 1)
    (0.5, -1.0, -0.8, True),      # min(0.5 * -1, 0.8 * -1)
    (1.1, 1.0, 1.1, False),       # within the bounds
])
def test_clipping_by_hand(ratio: float, advantage: float, gain: float, clipped: bool) -> None:
    """Against 1 - 0.2 .. 1 + 0.3: a gain is cut at the bound, a loss is not."""
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, sums = policy_loss(
        logp, torch.zeros(1), None, torch.tensor([advantage]), torch.ones(1), n_tokens=1,
        clip=(0.2, 0.3))
    loss.backward()
    assert math.isclose(-loss.item(), gain, rel_tol=1e-6)
    # What is clipped has no gradient.
    assert (logp.grad == 0) == clipped
    assert sums["clipped"] == float(clipped)


def test_completions_that_the_clip_cuts_are_counted() -> None:
    """Three completions of 2, 1 and 3 tokens; of the first and the last a token is cut."""
    logp = torch.tensor([2.0, 1.0, 1.0, 1.0, 3.0, 4.0]).log()
    ones = torch.ones(6)
    _, sums = policy_loss(
        logp, torch.zeros(6), None, ones, ones, 6, lengths=torch.tensor([2, 1, 3]))
    assert sums["clipped"] == 3 and sums["clipped_completions"] == 2


def test_at_ratio_one_the_gradient_is_reinforce() -> None:
    logp = torch.randn(7, requires_grad=True)
    advantage = torch.randn(7)
    loss, _ = policy_loss(logp, logp.detach(), None, advantage, torch.ones(7), n_tokens=20)
    loss.backward()
    assert torch.allclose(logp.grad, -advantage / 20)


def test_kl_by_hand_pulls_towards_the_reference() -> None:
    # k3 at the log-ratio r = logp_ref - logp is exp(r) - r - 1, here at r = 1 and r = -1; its
    # gradient in logp is 1 - exp(r).
    logp = torch.tensor([-2.0, -1.0], requires_grad=True)
    reference = torch.tensor([-1.0, -2.0])
    loss, sums = policy_loss(
        logp, logp.detach(), reference, torch.zeros(2), torch.ones(2), n_tokens=2, beta=0.5)
    loss.backward()
    assert math.isclose(sums["kl"].item(), (math.e - 2) + math.exp(-1), rel_tol=1e-5)
    by_hand = 0.5 / 2 * torch.tensor([1 - math.e, 1 - math.exp(-1)])
    assert torch.allclose(logp.grad, by_hand)
    # A step down the loss moves both towards the reference.
    assert logp.grad[0] < 0 < logp.grad[1]


def test_how_losses_are_put_together_by_hand() -> None:
    """Two completions of 2 and 3 tokens, in an optimizer step of 10 tokens and 4 completions."""
    lengths = torch.tensor([2, 3])
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    by_hand = {
        "dapo": (15 / 10, losses / 10),
        "grpo": ((1.5 + 4) / 4, losses / torch.tensor([2, 2, 3, 3, 3]) / 4),
        "dr-grpo": (15 / (4 * 6), losses / 24),
    }
    assert by_hand.keys() == set(LOSSES)
    for name, (expected, gradient) in by_hand.items():
        logp = torch.randn(5, requires_grad=True)
        # At ratio 1 the loss of a token is minus its advantage, and so is the gradient.
        loss, _ = policy_loss(
            logp, logp.detach(), None, -losses, torch.ones(5), 10, lengths=lengths,
            loss=name, completions=4, max_new_tokens=6)
        loss.backward()
        assert loss.item() == pytest.approx(expected)
        assert torch.allclose(logp.grad, gradient)


def test_a_completions_ratio_is_its_geometric_mean_and_all_its_tokens_share_the_gradient(
) -> None:
    ratios = torch.tensor([1.2, 0.8, 2.0, 1.0, 1.0])
    logp = ratios.log().requires_grad_()
    advantage = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.5])
    loss, sums = policy_loss(
        logp, torch.zeros(5), None, advantage, torch.ones(5), 5, (0.2, 0.2),
        lengths=torch.tensor([2, 3]), ratio="sequence")
    loss.backward()
    first = (1.2 * 0.8) ** (1 / 2)
    second = 2.0 ** (1 / 3)
    # The second, 1.26, is cut at 1.2.
    assert loss.item() == pytest.approx(-(2 * first + 3 * 0.5 * 1.2) / 5)
    # 2 tokens have the ratio, and each moves its logarithm by 1 / 2.
    assert logp.grad.tolist() == pytest.approx([-2 * first / 2 / 5] * 2 + [0] * 3)
    assert second > 1.2 and sums["clipped"] == 3 and sums["clipped_completions"] == 1


def test_a_token_of_weight_0_is_neither_learned_from_nor_counted() -> None:
    logp = torch.tensor([2.0, 2.0, 2.0]).log().requires_grad_()
    weight = torch.tensor([1.0, 0.0, 0.0])
    loss, sums = policy_loss(
        logp, torch.zeros(3), torch.zeros(3), -torch.ones(3), weight, 1, beta=0.1,
        lengths=torch.tensor([1, 2]))
    loss.backward()
    assert logp.grad[0] != 0 and logp.grad[1:].tolist() == [0, 0]
    assert sums["kl"].item() == pytest.approx(0.5 + math.log(2) - 1)
    _, sums = policy_loss(
        logp, torch.zeros(3), None, torch.ones(3), weight, 1, lengths=torch.tensor([1, 2]))
    assert sums["clipped"] == sums["clipped_completions"] == 1


# Four tokens of a policy that says word 0 or word 1, with the logits (theta, 0).
CHOSEN = [0, 1, 1, 0]
OLD_LOGP = [-0.9, -0.4, -1.2, -0.6]
REF_LOGP = [-0.7, -0.7, -0.6, -0.8]
ADVANTAGE = [0.7, -1.1, 0.4, -0.2]
CLIP = (0.2, 0.25)
N_TOKENS = 9
LENGTHS = [1, 3]


def loss_in_floats(
        theta: float, weights: Sequence[float], beta: float, loss: str, ratio: str) -> float:
    """The whole objective once more, without torch and token by token."""
    total = 0.0
    first = 0
    for length in LENGTHS:
        tokens = range(first, first + length)
        first += length
        logp = {i: -math.log(1 + math.exp(-theta if CHOSEN[i] == 0 else theta)) for i in tokens}
        of_completion = math.exp(sum(logp[i] - OLD_LOGP[i] for i in tokens) / length)
        for i in tokens:
            of_token = math.exp(logp[i] - OLD_LOGP[i])
            r = of_completion if ratio == "sequence" else of_token
            clipped_ratio = min(max(r, 1 - CLIP[0]), 1 + CLIP[1])
            gain = min(r * ADVANTAGE[i], clipped_ratio * ADVANTAGE[i])
            log_ratio_ref = REF_LOGP[i] - logp[i]
            gain -= beta * (math.exp(log_ratio_ref) - log_ratio_ref - 1)
            share = {"dapo": N_TOKENS, "grpo": 5 * length, "dr-grpo": 5 * 7}[loss]
            total += weights[i] * gain / share
    return -total


def check_finite_differences(
        theta: float, weights: Sequence[float], beta: float, loss: str = "dapo",
        ratio: str = "token") -> dict[str, Tensor]:
    """Loss and gradient of the one-parameter policy; -> the sums for the log."""
    def packed(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)
    parameter = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    logits = torch.stack((parameter, torch.zeros_like(parameter)))
    computed, sums = policy_loss(
        logits.log_softmax(0)[CHOSEN], packed(OLD_LOGP), packed(REF_LOGP), packed(ADVANTAGE),
        packed(weights), N_TOKENS, CLIP, beta, torch.tensor(LENGTHS), loss=loss, ratio=ratio,
        completions=5, max_new_tokens=7)
    computed.backward()
    expected = loss_in_floats(theta, weights, beta, loss, ratio)
    assert math.isclose(computed.item(), expected, rel_tol=1e-9)
    above = loss_in_floats(theta + 1e-6, weights, beta, loss, ratio)
    below = loss_in_floats(theta - 1e-6, weights, beta, loss, ratio)
    slope = (above - below) / 2e-6
    assert math.isclose(parameter.grad.item(), slope, rel_tol=1e-5, abs_tol=1e-9)
    return sums


@pytest.mark.parametrize("theta", [-0.8, 0.0, 0.37, 1.5])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (2.6, 2.6, 0.5, 0.5), (3.0, 1.3, 0.0, 1.0)])
def test_the_gradient_of_a_one_parameter_policy_matches_finite_differences(
        weights: tuple[float, ...], beta: float, theta: float) -> None:
    sums = check_finite_differences(theta, weights, beta)
    assert ("kl" in sums) == (beta > 0)


@pytest.mark.parametrize("theta", [-0.8, 0.0, 0.37, 1.5])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_objective_matches_finite_differences(
        loss: str, ratio: str, theta: float) -> None:
    check_finite_differences(theta, (2.6, 0.5, 0.5, 0.5), 0.1, loss, ratio)


def packed_completions(lengths: Tensor, seed: int = 0) -> list[Tensor]:
    """logp, old, reference, advantage (one a completion), weight: packed, float64."""
    random = torch.Generator().manual_seed(seed)
    n = int(lengths.sum())
    logp, old, reference = torch.randn(3, n, generator=random, dtype=torch.float64) / 2 - 2
    advantage = torch.randn(len(lengths), generator=random, dtype=torch.float64)
    weight = torch.rand(n, generator=random, dtype=torch.float64) + 0.5
    return [logp, old, reference, advantage.repeat_interleave(lengths), weight]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_add_up_over_micro_batches(loss: str, ratio: str) -> None:
    lengths = torch.tensor([3, 1, 4, 2, 6])
    objective = {"loss": loss, "ratio": ratio, "completions": 5, "max_new_tokens": 8}
    tensors = packed_completions(lengths)
    whole = tensors[0].clone().requires_grad_()
    expected, _ = policy_loss(
        whole, *tensors[1:], 16, (0.2, 0.3), 0.1, lengths, **objective)
    expected.backward()
    parts = tensors[0].clone().requires_grad_()
    total = 0.0
    for completions, tokens in ((slice(2), slice(4)), (slice(2, 5), slice(4, 16))):
        loss_of_part, _ = policy_loss(
            parts[tokens], *(x[tokens] for x in tensors[1:]), 16, (0.2, 0.3), 0.1,
            lengths[completions], **objective)
        loss_of_part.backward()
        total += loss_of_part.item()
    assert total == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(parts.grad, whole.grad, rtol=1e-12)


# ---------------------------------------------------------------- the loss beside TRL's

def trl_trainer(loss: str, ratio: str, beta: float, logp: Tensor) -> Any:
    """TRL's GRPOTrainer with all that its loss reads; its policy says logp (B, T)."""
    trl = pytest.importorskip("trl.trainer.grpo_trainer")
    trainer = object.__new__(trl.GRPOTrainer)
    trainer.args = SimpleNamespace(
        delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    trainer.accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer.model = SimpleNamespace(training=True)
    trainer.loss_type = loss.replace("-", "_")
    trainer.importance_sampling_level = ratio
    trainer.epsilon_low, trainer.epsilon_high = CLIP
    trainer.beta = beta
    trainer.max_completion_length = 6
    trainer.current_gradient_accumulation_steps = 1
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    trainer.aux_loss_enabled = trainer._entropy_bonus_enabled = False
    trainer.top_entropy_quantile = 1.0
    trainer.off_policy_mask_threshold = None
    trainer._metrics = {"train": defaultdict(list)}
    trainer._get_per_token_logps_and_entropies = (
        lambda *_, **__: (logp, torch.zeros_like(logp), None))
    return trainer


def trl_loss(trainer: Any, mask: Tensor, n_tokens: int, *tensors: Tensor) -> Tensor:
    """Its loss; mask (B, T) of the tokens that count; tensors: old, reference, advantage (B, T)."""
    old, reference, advantage = tensors
    ids = torch.zeros_like(mask)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids,
        "completion_mask": mask, "advantages": advantage[:, 0], "old_per_token_logps": old,
        "ref_per_token_logps": reference, "importance_sampling_ratio": torch.ones_like(old),
        "num_items_in_batch": torch.tensor(float(n_tokens))}
    return trainer._compute_loss(trainer.model, inputs)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_are_those_of_trl(
        loss: str, ratio: str, masked: bool, beta: float) -> None:
    """Clip-higher, and if masked without the third completion."""
    lengths = torch.tensor([3, 1, 6, 4, 2])
    logp, old, reference, advantage, _ = packed_completions(lengths)
    weight = torch.ones(16, dtype=torch.float64)
    weight[4:10] = float(not masked)
    n_tokens = int(weight.sum())

    ours = logp.clone().requires_grad_()
    computed, sums = policy_loss(
        ours, old, reference, advantage, weight, n_tokens, CLIP, beta, lengths, loss=loss,
        ratio=ratio, completions=5, max_new_tokens=6)
    computed.backward()

    def padded(x: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(x.split(lengths.tolist()), batch_first=True)
    theirs = logp.clone().requires_grad_()
    trainer = trl_trainer(loss, ratio, beta, padded(theirs))
    expected = trl_loss(
        trainer, padded(weight).long(), n_tokens, padded(old), padded(reference),
        padded(advantage))
    expected.backward()
    torch.testing.assert_close(computed, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert (ours.grad[4:10] == 0).all() == masked
    if beta:
        assert sums["kl"].item() / n_tokens == pytest.approx(trainer._metrics["train"]["kl"][0])


def test_two_minibatches_of_dapo_are_divided_by_other_numbers_than_trls() -> None:
    """docs/method.md has this exception: the first of two minibatches has 10 of 16 tokens. Here it
    is divided by these 10, in TRL by 16 / 2 = 8."""
    lengths = torch.tensor([3, 1, 6])
    logp, old, reference, advantage, _ = packed_completions(lengths)
    ours, _ = policy_loss(
        logp, old, None, advantage, torch.ones(10, dtype=torch.float64), 10, CLIP,
        lengths=lengths, loss="dapo", completions=3)

    def padded(x: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(x.split(lengths.tolist()), batch_first=True)
    trainer = trl_trainer("dapo", "token", 0.0, padded(logp))
    trainer.args.steps_per_generation = 2
    theirs = trl_loss(
        trainer, padded(torch.ones(10)).long(), 16, padded(old), padded(reference),
        padded(advantage))
    assert 10 * ours.item() == pytest.approx(8 * theirs.item(), rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_gradients_are_linear_in_the_weights_and_none_flows_into_them(beta: float) -> None:
    random = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(12, generator=random, dtype=torch.float64)
    logp = normal()
    old_logp = normal()
    ref_logp = normal()
    advantage = normal()

    def gradient(weight: Tensor) -> Tensor:
        parameter = logp.clone().requires_grad_()
        loss, _ = policy_loss(parameter, old_logp, ref_logp, advantage, weight, 12, beta=beta)
        loss.backward()
        return parameter.grad
    a = torch.rand(12, generator=random, dtype=torch.float64)
    b = torch.rand(12, generator=random, dtype=torch.float64)
    assert torch.allclose(gradient(2 * a + 3 * b), 2 * gradient(a) + 3 * gradient(b))
    assert torch.allclose(gradient(a), a * gradient(torch.ones_like(a)))
    weight = a.clone().requires_grad_()
    gradient(weight)
    assert weight.grad is None


# ---------------------------------------------------------------- weights of groups

IOUS = torch.tensor([
    [0.5, 0.5, 0.0, 0.0],     # mean 0.25, variance 0.0625
    [1.0, 1.0, 1.0, 1.0],     # mean 1, variance 0
    [0.0, 0.0, 0.0, 0.0],     # mean 0, variance 0
    [0.9, 0.9, 0.8, 0.0],     # mean 0.65, variance 0.1425
])


@pytest.mark.parametrize("weighting, weights", [
    ("consistency", [math.exp(0.9 + 0.0625), 1.0, 3.0, math.exp(1.2 * 0.35 + 0.1425)]),
    ("mean", [math.exp(0.9), 1.0, 3.0, math.exp(1.2 * 0.35)]),
    ("variance", [math.exp(0.0625), 1.0, 1.0, math.exp(0.1425)]),
    ("off", [1.0, 1.0, 1.0, 1.0]),
])
def test_every_weighting_by_hand(weighting: str, weights: list[float]) -> None:
    computed = rft.group_weights(IOUS, step_flags(weighting=weighting), step=0)
    assert computed.tolist() == pytest.approx(weights)


def test_lambdas_are_the_users() -> None:
    args = step_flags(weighting="consistency", lambdas=[0.4, 2.0])
    first = rft.group_weights(IOUS, args, step=0)[0].item()
    assert first == pytest.approx(math.exp(0.4 * 0.75 + 2 * 0.0625))


def test_weights_of_the_hard_iou_by_hand() -> None:
    """Above 0.5 counts as 1: the groups have hits 0, 4, 0 and 3 of 4."""
    computed = rft.group_weights(IOUS, step_flags(weight_of="iou_hard"), step=0)
    assert computed.tolist() == pytest.approx([3.0, 1.0, 3.0, math.exp(1.2 * 0.25 + 0.1875)])


def test_shuffled_weights_are_those_of_consistency_dealt_out_anew() -> None:
    plain = rft.group_weights(IOUS, step_flags(weighting="consistency"), step=0)
    orders = set()
    for step in range(6):
        dealt = rft.group_weights(IOUS, step_flags(weighting="shuffled"), step)
        assert torch.equal(dealt.sort()[0], plain.sort()[0])
        orders.add(tuple(dealt.tolist()))
    assert len(orders) > 2


def test_shuffled_weights_do_not_depend_on_the_number_of_processes(
        monkeypatch: pytest.MonkeyPatch) -> None:
    args = step_flags(weighting="shuffled")
    alone = rft.group_weights(IOUS, args, step=3)
    plain = rft.group_weights(IOUS, step_flags(weighting="consistency"), step=3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    # Process r has the questions r, r + 2; what is gathered has those of process 0 first.
    parts = torch.cat((plain[0::2], plain[1::2]))
    monkeypatch.setattr(dist, "gather_lists", lambda own: parts.tolist())
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        dealt = rft.group_weights(IOUS[rank::2], args, step=3)
        assert torch.equal(dealt, alone[rank::2])



# ---------------------------------------------------------------- grading

RECORD = SimpleNamespace(box=(0.0, 0.0, 10.0, 10.0), size=(100, 100))
FRAME = Frame((100, 100), (100, 100), "absolute")


def graded(texts: list[str], record: Any = RECORD, frame: Frame = FRAME, **flags: Any) -> Group:
    """A group of which only the texts matter, with its rewards."""
    group = Group(record, SimpleNamespace(frame=frame), [], [], texts, torch.zeros(len(texts)))
    return rft.grade(group, step_flags(**flags))



def test_every_question_keeps_its_own_rewards(dior_root: Path) -> None:
    """More rollouts than questions: boxes are graded against the box of their own question."""
    records = load("dior", dior_root, "train")[:2]
    for record in records:
        texts = [answer_text(record.box), answer_text(record.box), "nothing"]
        group = graded(texts, record, Frame(record.size, record.size, "absolute"))
        assert group.terms["iou"].tolist() == group.terms["format"].tolist() == [1, 1, 0]
        # IoU, the positional term at its weight, format.
        perfect = 1 + 0.1 * 0.94860 + 1
        assert group.reward.tolist() == pytest.approx([perfect, perfect, 0], abs=1e-5)
        assert group.boxes[2].isnan().all() and group.boxes[:2].isfinite().all()


def test_an_invalid_box_earns_no_reward_but_that_of_the_format() -> None:
    outside = answer_text([150, 150, 160, 160])
    terms = graded([outside, "<answer>"]).terms
    assert terms["iou"].tolist() == terms["positional"].tolist() == [0, 0]
    assert terms["format"].tolist() == [1, 0]


def fenced_list(box: Sequence[float], think: str = "<think>x</think>") -> str:
    """A text in our tags whose answer is written as Qwen2.5-VL writes boxes."""
    listed = f'[\n\t{{"bbox_2d": {list(box)}, "label": "the ship"}}\n]'
    return f"{think}<answer>\n```json\n{listed}\n```\n</answer>"


def test_answers_are_rewarded_as_models_write_them() -> None:
    """The target is 10 x 10, so the box 10 x 5 has an IoU of 0.5."""
    bare = '<think>x</think><answer>{}</answer>'
    terms = graded([
        fenced_list([0, 0, 10, 10]), fenced_list([0, 0, 10, 5.0]),
        bare.format('{"box": [0, 0, 10, 10.0]}'), bare.format('[{"": [0.0, 0, 10, 5]}]'),
        fenced_list([0, 0, 10, 10], think=""),
        # Two boxes earn nothing, nor do words.
        bare.format('[{"box": [0, 0, 10, 10]}, {"box": [0, 0, 10, 5]}]'),
        bare.format('{"box": [0, 0, 10, 10], "other": [0, 0, 10, 5]}'),
        bare.format('{"box": ["zero", "zero", "ten", "ten"]}')]).terms
    assert terms["iou"].tolist() == [1, 0.5, 1, 0.5, 1, 0, 0, 0]
    assert terms["format"].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_fenced_right_answers_have_the_whole_reward() -> None:
    for i in range(600):
        record = SimpleNamespace(box=(i / 10, 1.0, 70.5, 7 + i / 20), size=(100, 100))
        group = graded([fenced_list(record.box)], record)
        # IoU, the positional term at its weight, format.
        assert group.reward.item() == pytest.approx(1 + 0.1 * 0.94860 + 1, abs=1e-4)


def test_the_canary_counts_the_forms_of_answers(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    fenced = '<answer>```\n{"box": [0, 0, 10, 10]}\n```</answer>'
    texts = [answer_text([0, 0, 10, 10])] * 3 + [fenced_list([0, 0, 10, 5])] * 4
    texts += [fenced] * 2 + ['<answer>[{"box": [20, 20, 30, 30]}]</answer>', "nothing"]
    group = Group(RECORD, SimpleNamespace(frame=FRAME), [], [], texts, torch.zeros(11))
    monkeypatch.setattr(rft, "sample", lambda *_: [group])
    rft.canary(None, [RECORD], [None], step_flags())
    # IoU (3 + 4 / 2 + 2) / 11, format (3 + 4) / 11.
    assert capsys.readouterr().out == (
        "before step 1: mean IoU 0.636, format 0.636 over 11 sampled answers; form of the box, or "
        "why there is none: 4 fenced list, 3 bare, 2 fenced, 1 list, 1 no answer\n")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_a_ratio_per_sequence_with_a_loss_over_tokens_is_warned_about_once(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, loss: str, ratio: str,
) -> None:
    """TRL warns about the same combinations."""
    warned = ratio == "sequence" and loss in ("dapo", "dr-grpo")
    rft.check_flags(step_flags(ratio=ratio, loss=loss))
    written = capsys.readouterr().err
    assert written.count("warning") == written.count(f"--loss {loss} ") == warned
    monkeypatch.setenv("RANK", "1")
    rft.check_flags(step_flags(ratio=ratio, loss=loss))
    assert not capsys.readouterr().err


def test_a_term_that_forgets_invalid_boxes_rewards_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(pred: Tensor, target: Tensor, size: Tensor) -> Tensor:
        return torch.ones(pred.shape[:2])
    monkeypatch.setitem(reward.TERMS, "one", one)
    group = graded([answer_text([1, 1, 2, 2]), "nothing"], reward={"one": 1.0})
    assert group.reward.tolist() == [1, 0] and group.terms["iou"].shape == (2,)


def test_a_term_of_the_wrong_shape_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reward.TERMS, "flat", lambda pred, target, size: pred.sum((-1, -2)))
    with pytest.raises(ValueError, match="flat has the shape .1,., not"):
        graded(["a", "b"], reward={"flat": 1.0})


def test_a_replaced_term_is_the_one_that_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the positional one, whose plain version takes --alpha."""
    texts = [answer_text([1, 1, 9, 9]), "nothing"]
    for name in ("iou", "positional"):
        constant = lambda pred, target, size: torch.full(pred.shape[:2], 7.0)  # noqa: E731
        monkeypatch.setitem(reward.TERMS, name, constant)
        assert graded(texts, reward={name: 1.0}).reward.tolist() == [7, 0]
    monkeypatch.undo()
    wide, narrow = (graded(texts, reward={"positional": 1.0}, alpha=alpha).reward[0]
                    for alpha in (9.0, 0.5))
    assert wide > narrow > 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
def test_a_term_may_be_of_any_type(
        monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    hit = lambda pred, target, size: (reward.iou(pred, target) > 0.5).to(dtype)  # noqa: E731
    monkeypatch.setitem(reward.TERMS, "hit", hit)
    texts = [answer_text([0, 0, 10, 10]), answer_text([5, 5, 10, 10])]
    group = graded(texts, reward={"hit": 1.0})
    assert group.reward.tolist() == [1, 0] and group.reward.dtype == torch.float32


@pytest.mark.parametrize("name, words", [
    ("step", "cannot be called 'step'"), ("reward", "cannot be called 'reward'"),
    ("boxes", "cannot be called 'boxes'"), ("x_group_std", "cannot be called"),
    ("format", "rft.py computes itself")])
def test_a_term_whose_name_the_logs_use_is_refused(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str, words: str,
) -> None:
    monkeypatch.setitem(reward.TERMS, name, lambda pred, target, size: pred[..., 0])
    with pytest.raises(SystemExit) as leaving:
        rft.check_flags(step_flags(reward={name: 1.0}))
    assert leaving.value.code == 2 and words in capsys.readouterr().err


def test_a_reward_without_sense_is_refused_in_one_line(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    # A term of a resumed run that was not put into TERMS again, and no term at all.
    for weights, words in (({"width": 1.0}, "rewards 'width'"), ({"format": 0.0}, "no term")):
        with pytest.raises(SystemExit) as leaving:
            rft.check_flags(step_flags(reward=weights))
        said = capsys.readouterr().err
        assert leaving.value.code == 2 and words in said and len(said.splitlines()) == 1
    # A term that is not finite, be it only logged.
    nan = lambda pred, target, size: torch.full(pred.shape[:2], math.nan)  # noqa: E731
    monkeypatch.setitem(reward.TERMS, "nan", nan)
    with pytest.raises(SystemExit):
        graded([answer_text([1, 1, 2, 2]), "x"], reward={"iou": 1.0, "nan": 0.0})
    assert "the reward term nan is not finite" in capsys.readouterr().err


def test_groups_in_which_only_the_positional_term_varies() -> None:
    flat = torch.tensor([0.0, 0.0])
    steep = torch.tensor([0.2, 0.7])
    terms = {"iou": (flat, steep, flat, flat), "positional": (steep, steep, flat, steep),
             "format": (flat, flat, steep, steep)}
    groups = []
    for q in range(4):
        group = Group(RECORD, None, [], [], ["a", "b"], torch.zeros(2), torch.zeros(2, 4))
        group.terms = {name: values[q] for name, values in terms.items()}
        group.reward = sum(group.terms.values())
        groups.append(group)

    def alone(**reward: float) -> list[float]:
        """Of each group, the share of the step's |A| if only this group had some."""
        args = step_flags(group=2, reward={"iou": 1.0, "positional": 0.1, "format": 1.0} | reward)
        lines = [rft.summary(groups, a[:, None].expand(4, 2), torch.ones(4), args)
                 for a in torch.eye(4)]
        return [line["positional_alone_advantage"] for line in lines]
    assert alone() == [1, 0, 0, 0]
    # A term of weight 0 does not separate answers.
    assert alone(format=0.0) == [1, 0, 0, 1]
    assert alone(positional=0.0) == [0, 0, 0, 0]



def test_rewards_or_an_entropy_that_collapse_are_warned_about() -> None:
    fine = {"zero_variance_groups": 0.75, "entropy": 0.5}
    equal = {"zero_variance_groups": 1.0, "entropy": 0.5}
    certain = {"zero_variance_groups": 0.75, "entropy": 0.002}
    n = rft.COLLAPSED_AFTER
    assert not rft.collapse([]) and not rft.collapse([fine] * 3 * n)
    for bad, words in (
            (equal, "no group's rewards have differed"), (certain, "the entropy has been below")):
        assert not rft.collapse([fine] + [bad] * (n - 1))
        assert not rft.collapse([bad] * n + [fine])
        (sentence,) = rft.collapse([fine] + [bad] * n)
        assert words in sentence
    assert len(rft.collapse([equal | certain | {"zero_variance_groups": 1.0}] * n)) == 2
    # Steps whose rollouts are all masked say nothing about the entropy.
    assert not rft.collapse([fine | {"entropy": 0.0}] * n)


def test_a_warning_is_in_every_line_and_is_printed_when_it_begins(
        capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    args = step_flags(out=str(tmp_path / "out"), resume=False, steps=10, every=10)
    run = runtime.Run(args, "rft", Records([], {}))
    run.bar = tqdm(disable=True)
    for step, more in enumerate(([], ["a"], ["a"], ["a", "b"], []), 1):
        run.log({"step": step, "finite": True}, runtime.Batch([], [], []), more)
    warnings = [line.get("warning") for line in run.lines]
    assert warnings == [None, "a", "a", "a; b", None]
    assert runtime.read_log(tmp_path / "out" / "metrics.jsonl") == run.lines
    said = capfd.readouterr().err.splitlines()
    assert [words for words in said if words.startswith("warning")] == [
        "warning, step 2: a", "warning, step 4: a; b"]



# ---------------------------------------------------------------- a step

def grade_by_letters(group: Group, args: argparse.Namespace) -> Group:
    """Rewards made up from the text, for a random model's boxes never parse."""
    boxes = []
    rewards = []
    for text in group.texts:
        n_letters = len(set(text))
        boxes.append([n_letters, 1.0, n_letters + 9, 8.0])
        rewards.append(text.count("e") + sum(map(ord, text)) % 7 / 7)
    group.reward = torch.tensor(rewards)
    group.terms = {"iou": group.reward / 9, "positional": group.reward, "format": group.reward}
    group.boxes = torch.tensor(boxes)
    return group



@pytest.fixture
def train_one_step(
        monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, dior_root: Path,
) -> Callable[..., tuple[dict[str, Tensor], LogLine]]:
    """train_one_step(flag=value) -> gradients by parameter name, and the log line.

    Gradients are summed over optimizer steps, each of which moves the weights by `move` times
    its gradient.
    """
    def train(move: float = 0.0, **changes: Any) -> tuple[dict[str, Tensor], LogLine]:
        model = QwenVL.from_pretrained(tiny_checkpoint, dtype=None)
        policy = rft.Policy(model, Processor.from_pretrained(tiny_checkpoint), None, None)
        gradients = {}

        def keep_gradients(model: QwenVL, opt: None, lr: float) -> float:
            for name, parameter in model.named_parameters():
                gradients[name] = gradients.get(name, 0) + parameter.grad
                parameter.data.add_(parameter.grad, alpha=-move)
            model.zero_grad()
            return 1.0
        monkeypatch.setattr(rft, "grade", grade_by_letters)
        monkeypatch.setattr(dist, "update", keep_gradients)
        args = step_flags(**changes)
        records = load("dior", dior_root, "train")
        batch = [runtime.record_at(records, i, args.seed) for i in range(args.prompts)]
        prompts = [policy.processor(open_image(r), r.text) for r in batch]
        line, _ = rft.train_step(policy, batch, prompts, args, step=0)
        return gradients, line
    return train


def assert_close_gradients(
        gradients: dict[str, Tensor], expected: dict[str, Tensor], factor: float = 1.0) -> None:
    """gradients = factor * expected, to rounding."""
    for name, gradient in expected.items():
        difference = (gradients[name] - factor * gradient).norm()
        assert difference <= 1e-4 * factor * gradient.norm(), name


# All in one pass, and in several.
@pytest.mark.parametrize("micro_tokens", [10 ** 6, 400])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_does_not_depend_on_the_micro_batch(
        train_one_step: Callable, loss: str, micro_tokens: int) -> None:
    expected, line_of_single = train_one_step(micro_tokens=1, loss=loss)
    gradients, line = train_one_step(micro_tokens=micro_tokens, loss=loss)
    assert line_of_single["advantage"] > 0
    assert math.isclose(line_of_single["loss"], line["loss"], abs_tol=1e-6)
    assert_close_gradients(gradients, expected)


def test_minibatches_share_a_steps_questions_out(train_one_step: Callable) -> None:
    """dr-grpo divides by a constant, of half as many completions in each of two minibatches."""
    expected, line = train_one_step(loss="dr-grpo")
    gradients, line_of_two = train_one_step(loss="dr-grpo", minibatches=2)
    assert_close_gradients(gradients, expected, 2.0)
    for name in ("loss", "entropy", "length", "reward"):
        assert line_of_two[name] == pytest.approx(line[name], abs=1e-6), name


def with_groups(
        monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Group]], None]) -> None:
    """rft.sample with groups that were changed in place."""
    sample = rft.sample

    def sample_and_change(*args: Any) -> list[Group]:
        groups = sample(*args)
        change(groups)
        return groups
    monkeypatch.setattr(rft, "sample", sample_and_change)



def test_what_is_truncated_can_be_left_out(
        monkeypatch: pytest.MonkeyPatch, train_one_step: Callable) -> None:
    """The mean is over the tokens that are left; all left out, nothing is learned."""
    cut = torch.tensor([[True, False, False]] * 3 + [[True, True, True]])
    n_tokens = {}

    def cut_some(groups: list[Group]) -> None:
        for group, truncated in zip(groups, cut):
            group.truncated = truncated
        lengths = torch.tensor([[len(c) for c in group.completions] for group in groups])
        n_tokens["all"] = lengths.sum().item()
        n_tokens["left"] = lengths[~cut].sum().item()
    with monkeypatch.context() as patch:
        with_groups(patch, cut_some)
        _, line = train_one_step(loss="dapo")
        gradients, line_of_left = train_one_step(mask_truncated=True, loss="dapo")
        assert line["truncated"] == line_of_left["truncated"] == 0.5
        assert 0 < n_tokens["left"] < n_tokens["all"]

    # As if the truncated ones had no advantage, and only the others were counted.
    advantages = rft.advantages
    monkeypatch.setattr(
        rft, "advantages", lambda *args: advantages(*args).masked_fill(cut, 0.0))
    expected, _ = train_one_step(loss="dapo")
    assert_close_gradients(gradients, expected, n_tokens["all"] / n_tokens["left"])

    def cut_all(groups: list[Group]) -> None:
        for group in groups:
            group.truncated = torch.ones_like(group.truncated)
    with_groups(monkeypatch, cut_all)
    gradients, line = train_one_step(mask_truncated=True, loss="dapo")
    assert line["loss"] == line["entropy"] == 0
    for gradient in gradients.values():
        assert (gradient == 0).all()


def test_a_rollout_that_ends_at_the_limit_is_not_truncated(
        monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    model = QwenVL.from_pretrained(tiny_checkpoint, dtype=None)
    policy = rft.Policy(model, Processor.from_pretrained(tiny_checkpoint), None, None)
    end = model.stop_ids[0]
    tokens = torch.tensor([[[65, 66, end], [65, 66, 67], [end, 0, 0]]])
    lengths = torch.tensor([[3, 3, 1]])
    monkeypatch.setattr(rft, "generate", lambda *_: (tokens, torch.zeros(1, 3, 3), lengths))
    (group,) = rft.sample(policy, [RECORD], [None], torch.zeros(1), step_flags(max_new_tokens=3))
    assert group.truncated.tolist() == [False, True, False]


# ---------------------------------------------------------------- old policies

# exp of it is 1.5.
SAMPLED_LOWER = math.log(1.5)


@pytest.fixture
def old_and_scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """(old, scored) of each call of policy_loss, if the sampler's log-probabilities are lower
    than the scored ones by SAMPLED_LOWER."""
    def lower(groups: list[Group]) -> None:
        for group in groups:
            for logp in group.sampled_logp:
                logp -= SAMPLED_LOWER
    with_groups(monkeypatch, lower)
    calls = []
    policy_loss = rft.policy_loss

    def keep(logp: Tensor, old: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, dict]:
        calls.append((old, logp.detach()))
        return policy_loss(logp, old, *rest, **more)
    monkeypatch.setattr(rft, "policy_loss", keep)
    return calls


@pytest.mark.parametrize("flags, sampler", [
    ({}, False), ({"updates": 2}, True), ({"minibatches": 2}, True)])
def test_the_ratio_is_to_the_sampler_as_soon_as_a_step_has_several_updates(
        train_one_step: Callable, old_and_scored: list, flags: dict[str, Any], sampler: bool,
) -> None:
    train_one_step(**flags)
    for old, scored in old_and_scored:
        expected = scored - SAMPLED_LOWER if sampler else scored
        torch.testing.assert_close(old, expected, atol=1e-4, rtol=0)
    assert len(old_and_scored) == flags.get("updates", 1) * flags.get("minibatches", 1)


# ---------------------------------------------------------------- resampling

def numbered_records(n: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(id=str(i)) for i in range(n)]


def fresh_ids(records: Sequence, step: int, turn: int, **flags: Any) -> list[str]:
    args = step_flags(**flags)
    return [r.id for r in rft.fresh_records(records, args, step, turn)]


def test_fresh_questions_are_new_to_the_step_and_the_same_for_any_number_of_processes(
        monkeypatch: pytest.MonkeyPatch) -> None:
    records = numbered_records(40)
    orders = set()
    for step in (0, 7, 23):
        batch = {runtime.record_at(records, i, 0).id for i in range(4 * step, 4 * step + 4)}
        turns = [fresh_ids(records, step, turn) for turn in (1, 2, 3)]
        assert len({*batch, *turns[0], *turns[1], *turns[2]}) == 16
        assert turns == [fresh_ids(records, step, turn) for turn in (1, 2, 3)]
        assert turns[0] != fresh_ids(records, step, 1, seed=1)
        orders.add(tuple(turns[0]))
        monkeypatch.setenv("WORLD_SIZE", "2")
        for rank in (0, 1):
            monkeypatch.setenv("RANK", str(rank))
            assert fresh_ids(records, step, 2) == turns[1][rank::2]
        monkeypatch.delenv("WORLD_SIZE")
        monkeypatch.delenv("RANK")
    assert len(orders) == 3


@pytest.mark.parametrize("n", [1, 4, 6])
def test_where_there_are_too_few_records_they_come_again(n: int) -> None:
    records = numbered_records(n)
    batch = {runtime.record_at(records, i, 0).id for i in range(4)}
    for turn in (1, 2):
        ids = fresh_ids(records, 0, turn)
        assert len(ids) == 4 and (n <= 4 or not batch & set(ids))


def test_seeds_differ_between_places_turns_and_steps() -> None:
    args = step_flags()
    turns = itertools.product(range(3), range(3))
    seeds = torch.cat([rft.step_seeds(args, step, turn) for step, turn in turns])
    assert len(seeds.unique()) == 3 * 3 * 4


def test_seeds_of_the_first_sampling_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """(seed * 1,000,003 + step) * Q + place, as in all earlier runs."""
    assert rft.step_seeds(step_flags(), 0).tolist() == [0, 1, 2, 3]
    args = step_flags(seed=2)
    assert rft.step_seeds(args, 5).tolist() == [8_000_044, 8_000_045, 8_000_046, 8_000_047]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert rft.step_seeds(args, 5).tolist() == [8_000_045, 8_000_047]


def test_seeds_of_resampled_turns_are_no_other_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn t of seed s once drew the numbers of seed s + t."""
    runs = [step_flags(seed=seed, prompts=Q) for seed in (0, 1, 2, 2 ** 31 - 1) for Q in (4, 8)]
    resampled = []
    for args, step, turn in itertools.product(runs, range(4), range(1, 4)):
        seeds = rft.step_seeds(args, step, turn)
        assert seeds.dtype == torch.long and (seeds < 0).all() and len(seeds) == args.prompts
        resampled += seeds.tolist()
    assert len(set(resampled)) == len(resampled) == 4 * 4 * 3 * (4 + 8)
    for args, step in itertools.product(runs, range(4)):
        assert (rft.step_seeds(args, step) >= 0).all()
    # Two processes draw what one does.
    alone = rft.step_seeds(runs[0], 1, 2).tolist()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert rft.step_seeds(runs[0], 1, 2).tolist() == alone[rank::2]


def test_a_group_stays_for_a_turn_whose_fresh_image_cant_be_read(
        monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(record: SimpleNamespace) -> None:
        if record.id == "broken":
            raise UnreadableImage("broken.jpg")

    def sample(policy: rft.Policy, records: list, *more: Any) -> list[Group]:
        assert not records
        return []
    monkeypatch.setattr(rft, "open_image", opened)
    monkeypatch.setattr(rft, "sample", sample)
    policy = rft.Policy(None, lambda image, text: None, None, None)
    group = Group(None, None, [], [], [], torch.zeros(2), reward=torch.ones(2))
    args = step_flags(resample=2, group=2, prompts=1)
    fresh = [SimpleNamespace(id="broken", text="the ship")]
    groups = [group]
    line = rft.resample(policy, groups, lambda turn: fresh, args, step=0)
    assert groups == [group]
    assert line["resampled"] == 0


@pytest.mark.parametrize("turns, ids, flat", [
    (0, ["a", "b", "c", "d"], 2),
    (1, ["a", "fresh 1 of 1", "c", "fresh 1 of 3"], 1),
    (2, ["a", "fresh 1 of 1", "c", "fresh 2 of 3"], 1),
    (9, ["a", "fresh 1 of 1", "c", "fresh 3 of 3"], 0),
])
def test_groups_that_do_not_vary_are_replaced_until_they_do(
        monkeypatch: pytest.MonkeyPatch, turns: int, ids: list[str], flat: int) -> None:
    """b and d do not vary, nor do the first two fresh questions in the place of d."""
    steady = ("b", "d", "fresh 1 of 3", "fresh 2 of 3")

    def record(name: str) -> SimpleNamespace:
        return SimpleNamespace(id=name, text=f"text of {name}")

    def sample(
            policy: None, records: list, prompts: list, seeds: Tensor, args: argparse.Namespace,
    ) -> list[Group]:
        assert len(records) == len(prompts) == len(seeds)
        groups = []
        for r, prompt in zip(records, prompts):
            cut = torch.tensor([r.id.startswith("fresh")] * 2)
            groups.append(Group(r, prompt, [r.id] * 2, [r.id] * 2, [r.id] * 2, cut))
        return groups

    def grade(group: Group, args: argparse.Namespace) -> Group:
        group.reward = torch.tensor([0.5, 0.5 if group.record.id in steady else 1.0])
        return group
    monkeypatch.setattr(rft, "sample", sample)
    monkeypatch.setattr(rft, "grade", grade)
    monkeypatch.setattr(rft, "open_image", lambda record: f"image of {record.id}")
    policy = rft.Policy(None, lambda image, text: (image, text), None, None)
    args = step_flags(resample=turns, group=2)
    records = [record(name) for name in "abcd"]
    prompts = [policy.processor(f"image of {r.id}", r.text) for r in records]
    groups = [grade(g, args) for g in sample(None, records, prompts, torch.zeros(4), args)]
    fresh = lambda turn: [record(f"fresh {turn} of {i}") for i in range(4)]  # noqa: E731
    line = rft.resample(policy, groups, fresh, args, step=0)

    assert [group.record.id for group in groups] == ids
    # All that belongs to a question has moved with it.
    for group, name in zip(groups, ids):
        assert group.prompt == (f"image of {name}", f"text of {name}")
        assert group.texts == group.completions == group.sampled_logp == [name] * 2
        assert group.truncated[0] == name.startswith("fresh")
    assert sum(not rft.varies(group.reward[None]) for group in groups) == flat
    assert line.get("resampled", 0) == (0, 2, 3, 4)[min(turns, 3)]
    assert ("resampled" in line) == (turns > 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_and_scored_log_probabilities_agree_at_the_sampling_temperature(
        train_one_step: Callable, temperature: float) -> None:
    _, line = train_one_step(temperature=temperature)
    assert line["sampled_scored_max"] < 1e-4


def run_main(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    """rft.main in this process, on the CPU."""
    monkeypatch.setattr(sys, "argv", ["rft.py", *map(str, flags), "--device", "cpu"])
    rft.main()


def read_log(out: Path, name: str = "metrics.jsonl") -> list[LogLine]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def with_two_boxes(sample: Callable[..., list[Group]]) -> Callable[..., list[Group]]:
    """rft.sample with boxes of 50 and 100 pixels' width in place of a random model's texts."""
    def sample_boxes(*args: Any) -> list[Group]:
        groups = sample(*args)
        for group in groups:
            group.texts = [answer_text([0, 0, 50, 20]), answer_text([0, 0, 100, 20])]
        return groups
    return sample_boxes


def test_a_term_of_ones_own_is_chosen_by_name_and_stands_in_every_log(
        monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, dior_root: Path, tmp_path: Path,
) -> None:
    """A term is put into TERMS before main, and nothing else is edited."""
    def width(pred: Tensor, target: Tensor, size: Tensor) -> Tensor:
        return (pred[..., 2] - pred[..., 0]) / size[..., 0]
    monkeypatch.setitem(reward.TERMS, "width", width)
    monkeypatch.setattr(rft, "sample", with_two_boxes(rft.sample))
    out = tmp_path / "out"
    run_main(
        monkeypatch, "--data", "dior", "--root", dior_root, "--init", tiny_checkpoint, "--out", out,
        "--prompts", 2, "--group", 2, "--max-new-tokens", 4, "--val", 0, "--every", 2,
        "--steps", 2, "--reward", "width=0.5", "format=1")
    lines = read_log(out)
    for line in lines:
        # The model's frame is 112 wide.
        assert line["width"] == pytest.approx((50 + 100) / 2 / 112)
        assert line["width_group_std"] > 0.1
        assert line["reward"] == pytest.approx(0.5 * line["width"] + line["format"])
        assert "positional" not in line and "positional_alone_advantage" not in line
    for row in read_log(out, "rollouts.jsonl"):
        assert row["reward"][0] < row["reward"][1] and len(row["width"]) == 2
    figure = page.training_section("rft", out, [])
    assert re.findall(">([^<>]*)</span>", figure)[:4] == ["reward", "width", "format", "iou"]
    description = json.loads((out / "latest" / "run.json").read_text())
    assert description["flags"]["reward"] == {"width": 0.5, "format": 1.0}


def test_direct_grpo_of_a_model_whose_answers_are_fenced_has_a_reward_from_step_1(
        monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, tiny_checkpoint: Path,
        dior_root: Path, tmp_path: Path) -> None:
    """A checkpoint that no CoT-SFT has trained answers with the whole image, or with its left
    half: 112 x 84 in the model's frame."""
    tokenizer = Processor.from_pretrained(tiny_checkpoint).tokenizer
    texts = [fenced_list([0, 0, 112, 84]), fenced_list([0, 0, 56, 84])]

    def generate_fenced(model: QwenVL, prompts: list, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        rows = [[*tokenizer.encode(text).ids, model.stop_ids[0]] for text in texts]
        tokens = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True)
        tokens = tokens.expand(len(prompts), -1, -1)
        lengths = torch.tensor([len(row) for row in rows]).expand(len(prompts), -1)
        return tokens, torch.zeros(tokens.shape), lengths
    monkeypatch.setattr(rft, "generate", generate_fenced)
    out = tmp_path / "out"
    run_main(
        monkeypatch, "--data", "dior", "--root", dior_root, "--init", tiny_checkpoint, "--out", out,
        "--prompts", 2, "--group", 2, "--max-new-tokens", 200, "--val", 0, "--steps", 1)
    assert "4 fenced list\n" in capfd.readouterr().out
    (line,) = read_log(out)
    assert line["format"] == 1 and line["unparsable"] == 0 and line["reward"] > 1
    for row in read_log(out, "rollouts.jsonl"):
        x1, y1, x2, y2 = row["target"]
        assert row["texts"] == texts
        # Images have 120 x 90 pixels.
        of_whole = (x2 - x1) * (y2 - y1) / (120 * 90)
        assert row["iou"][0] == pytest.approx(of_whole, abs=1e-4)


def test_picture_and_log_come_before_the_checkpoint_and_a_last_gradient_must_be_finite(
        monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, tiny_checkpoint: Path,
        dior_root: Path, tmp_path: Path) -> None:
    def check_what_is_there(out: Path, line: LogLine, *rest: Any) -> None:
        step = line["step"]
        last = read_log(out)[-1]
        assert last["step"] == step and "val_mIoU" in last
        assert (out / f"rollouts_{step:06d}.png").exists()

    def last_is_nan(model: QwenVL, opt: torch.optim.Optimizer, lr: float) -> float:
        # Only the last of three steps has a learning rate below 7e-5.
        return math.nan if lr < 7e-5 else 1.0
    monkeypatch.setattr(checkpoints, "save", check_what_is_there)
    monkeypatch.setattr(dist, "update", last_is_nan)
    with pytest.raises(SystemExit) as leaving:
        run_main(
            monkeypatch, "--data", "dior", "--root", dior_root, "--init", tiny_checkpoint,
            "--out", tmp_path / "out", "--prompts", 2, "--group", 2, "--max-new-tokens", 4,
            "--val", 1, "--every", 1, "--steps", 3, "--lr", 1e-4)
    assert leaving.value.code == 2
    assert "no gradient is finite from step 3 on" in capfd.readouterr().err


# ---------------------------------------------------------------- as a user runs it

@pytest.fixture(scope="module")
def taught(
        tiny_checkpoint: Path, dior_root: Path, tmp_path_factory: pytest.TempPathFactory,
        run: Run) -> Path:
    """A stage of sft.py that has learned to answer in the format: rewards are not all zero."""
    out = tmp_path_factory.mktemp("taught") / "sft"
    script = run(
        "sft.py", "--data", "dior", "--root", dior_root, "--init", tiny_checkpoint, "--out", out,
        "--steps", 60, "--batch", 8, "--micro-tokens", 10 ** 6, "--lr", 5e-3, "--answer-only",
        "--val", 0, "--every", 60, "--device", "cpu")
    assert script.returncode == 0, script.stderr
    return out


@pytest.fixture(scope="module")
def run_rft(taught: Path, dior_root: Path, run: Run) -> Callable[..., list[LogLine]]:
    """run_rft(out, flag, value, ..., processes=2) -> the log of the stage."""
    def run_stage(out: Path, *flags: object, processes: int | None = None) -> list[LogLine]:
        script = run(
            "rft.py", "--data", "dior", "--root", dior_root, "--init", taught, "--out", out,
            "--prompts", 4, "--group", 4, "--micro-tokens", 800, "--max-new-tokens", 60,
            "--lr", 1e-4, "--val", 2, "--device", "cpu",
            "--reward", "iou=1", "positional=0.5", "format=0", *flags, processes=processes)
        assert script.returncode == 0, script.stderr
        return read_log(out)
    return run_stage


def point_latest_at(out: Path, step: int) -> None:
    (out / "latest").unlink()
    (out / "latest").symlink_to(f"step_{step:06d}")


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors")


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_close_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() < 1e-3, name


def without_measurements(line: LogLine) -> LogLine:
    """A log line less its seconds and memory, which differ from run to run."""
    return {k: v for k, v in line.items() if "seconds" not in k and k not in ("peak_GiB", "time")}


def assert_close_logs(a: list[LogLine], b: list[LogLine], names: Sequence[str]) -> None:
    """Two logs agree in these figures to rounding."""
    for line_a, line_b in zip(a, b, strict=True):
        for name in names:
            close = math.isclose(line_a[name], line_b[name], rel_tol=1e-3, abs_tol=1e-5)
            assert close, (line_a["step"], name)


WEIGHT_KEYS = ("consistency_weight", "consistency_weight_min", "consistency_weight_max")


def test_one_and_two_processes_train_alike_and_a_resume_goes_on_as_if_never_interrupted(
        run: Run, run_rft: Callable, tmp_path: Path) -> None:
    """With the defaults: consistency weights and a reference."""
    flags = ("--steps", 3, "--every", 2)
    one = tmp_path / "one"
    two = tmp_path / "two"
    log = run_rft(one, *flags)
    assert any(line["advantage"] > 0 for line in log)
    assert log[-1]["unparsable"] < 1
    for line in log:
        assert line.keys() - rft.RESERVED == {
            "iou", "positional", "format",
            "reward_group_std", "iou_group_std", "positional_group_std", "format_group_std"}
    log_of_two = run_rft(two, *flags, processes=2)
    assert_close_logs(log, log_of_two, (
        "reward", "loss", "grad_norm", *WEIGHT_KEYS, "kl", "positional_alone_advantage",
        "entropy", "length"))
    expected = load_weights(one / "latest")
    assert_close_weights(load_weights(two / "latest"), expected)

    # As after a crash behind step 2, and in a folder that was moved since.
    interrupted = tmp_path / "interrupted"
    shutil.rmtree(one / "step_000003")
    point_latest_at(one, 2)
    one.rename(interrupted)
    resumed = run_rft(interrupted, *flags, "--resume")
    assert [line["step"] for line in resumed] == [1, 2, 3]
    assert without_measurements(resumed[2]) == without_measurements(log[2])
    assert_same_weights(load_weights(interrupted / "latest"), expected)

    # The state of two processes is read by one.
    point_latest_at(two, 2)
    run_rft(two, *flags, "--resume")
    assert_close_weights(load_weights(two / "latest"), expected)

    rollouts = read_log(interrupted, "rollouts.jsonl")
    assert len(rollouts) == 12
    assert len(rollouts[0]["texts"]) == len(rollouts[0]["reward"]) == 4
    assert (interrupted / "rollouts_000002.png").exists()
    check_evaluation(run, interrupted)


def check_evaluation(run: Run, stage: Path) -> None:
    """eval.py finds the data set and its root in the checkpoint."""
    script = run("eval.py", stage, "--device", "cpu", "--max-new-tokens", 60)
    assert script.returncode == 0, script.stderr
    assert "mIoU" in script.stdout
    row = json.loads(next(stage.rglob("eval.json")).read_text())["rows"][0]
    assert row["data"] == "dior" and row["n"] == 4


OBJECTIVE = (
    "--loss", "grpo", "--ratio", "sequence", "--clip", 0.01, 0.02, "--mask-truncated",
    "--updates", 2, "--minibatches", 2)


def test_resampling_with_another_objective_on_two_processes_and_resumed(
        run_rft: Callable, tmp_path: Path) -> None:
    flags = ("--steps", 3, "--every", 2, "--val", 0, "--resample", 3, *OBJECTIVE)
    one = tmp_path / "one"
    two = tmp_path / "two"
    log = run_rft(one, *flags)
    assert sum(line["resampled"] for line in log) > 0
    assert any(line["clipped"] > 0 for line in log)
    log_of_two = run_rft(two, *flags, processes=2)
    assert_close_logs(log, log_of_two, (
        "resampled", "zero_variance_groups", "reward", "loss", "grad_norm", "kl",
        "clipped_completions", "truncated", "consistency_weight"))
    expected = load_weights(one / "latest")
    assert_close_weights(load_weights(two / "latest"), expected)
    # The first of two processes has the places 0 and 2 of each step.
    rollouts = read_log(one, "rollouts.jsonl")
    for row, row_of_two in zip(rollouts[::2], read_log(two, "rollouts.jsonl"), strict=True):
        assert row["id"] == row_of_two["id"] and row["texts"] == row_of_two["texts"]
    # They are what was learned from.
    for line in log:
        rewards = [row["reward"] for row in rollouts if row["step"] == line["step"]]
        flat = sum(len(set(group)) == 1 for group in rewards)
        assert flat == round(line["zero_variance_groups"] * 4)

    # As after a crash behind step 2.
    shutil.rmtree(one / "step_000003")
    point_latest_at(one, 2)
    resumed = run_rft(one, *flags, "--resume")
    assert without_measurements(resumed[2]) == without_measurements(log[2])
    assert read_log(one, "rollouts.jsonl") == rollouts
    assert_same_weights(load_weights(one / "latest"), expected)


@pytest.mark.parametrize("weighting", ["mean", "variance", "off", "shuffled"])
def test_every_weighting_on_two_processes_and_resumed(
        run: Run, run_rft: Callable, tmp_path: Path, weighting: str) -> None:
    """Without a reference; the test above has the consistency weights."""
    flags = ("--steps", 2, "--every", 1, "--val", 0, "--beta", 0,
             "--weighting", weighting, 0.9, 1)
    out = tmp_path / "one"
    log = run_rft(out, *flags)
    log_of_two = run_rft(tmp_path / "two", *flags, processes=2)
    assert_close_logs(log, log_of_two, ("reward", "loss", "grad_norm", *WEIGHT_KEYS))
    for line in log:
        assert "kl" not in line
    weights_differ = log[0]["consistency_weight_max"] > log[0]["consistency_weight_min"]
    assert weights_differ == (weighting != "off")

    # As after a crash behind step 1.
    expected = load_weights(out / "latest")
    shutil.rmtree(out / "step_000002")
    point_latest_at(out, 1)
    resumed = run_rft(out, *flags, "--resume")
    assert without_measurements(resumed[1]) == without_measurements(log[1])
    assert_same_weights(load_weights(out / "latest"), expected)


def test_a_resume_with_other_terms_is_refused(
        run: Run, run_rft: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_rft(out, "--steps", 1, "--val", 0, "--beta", 0)
    script = run("rft.py", "--out", out, "--resume", "--steps", 2, "--reward", "iou=1", "giou=0.5")
    assert script.returncode == 2 and len(script.stderr.strip().splitlines()) == 1
    assert "--reward iou=1 giou=0.5, but the run" in script.stderr
    assert "has iou=1 positional=0.5 format=0;" in script.stderr


def test_epochs_are_turned_into_steps(run_rft: Callable, tmp_path: Path) -> None:
    """There are 16 records, and a step takes 4."""
    out = tmp_path / "out"
    assert len(run_rft(out, "--epochs", 0.5, "--val", 0)) == 2
    flags = json.loads((out / "latest" / "run.json").read_text())["flags"]
    assert flags["steps"] == 2 and flags["epochs"] is None
    assert len(run_rft(out, "--resume", "--epochs", 0.75, "--val", 0)) == 3


def test_a_reference_policy_starts_at_kl_zero_and_is_left(
        run_rft: Callable, tmp_path: Path) -> None:
    flags = ("--steps", 2, "--every", 2, "--beta", 0.1)
    one_pass = [line["kl"] for line in run_rft(tmp_path / "1", *flags, "--updates", 1)]
    two_passes = [line["kl"] for line in run_rft(tmp_path / "2", *flags, "--updates", 2)]
    assert one_pass[0] < 1e-9 < one_pass[1]
    # The second pass of a step is off policy already.
    assert two_passes[0] > 1e-9


def test_an_output_that_stands_is_not_overwritten(
        run: Run, taught: Path, dior_root: Path) -> None:
    before = sorted(p.name for p in taught.iterdir())
    script = run("rft.py", "--data", "dior", "--root", dior_root, "--init", taught,
                 "--out", taught)
    assert script.returncode == 2
    assert "--resume" in script.stderr and len(script.stderr.strip().splitlines()) == 1
    assert sorted(p.name for p in taught.iterdir()) == before


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize("flags, words", [
    ("--data nothing", "no data set is called"),
    ("--data dior --root nowhere", "nowhere"),
    ("--init nowhere", "no checkpoint at nowhere"),
    ("--group 1", "--group 1"),
    ("--steps many", "--steps"),
    ("--weighting sometimes", "--weighting: sometimes is not one of consistency, mean"),
    ("--weighting mean 1", "--weighting: 1: 2 values belong here"),
    ("--weighting mean 1 0 soft", "--weighting: soft is not one of iou, iou_hard"),
    ("--weighting mean nan 0", "--weighting: nan is not a number"),
    ("--unknown", "--unknown"),
    ("--resume", "--resume"),
    ("--reward iou=1 iuo=1", "no term is called 'iuo'"),
    ("--reward iou=1 iou=2", "iou is given twice"),
    ("--reward iou=much", "iou=much is not NAME=WEIGHT"),
    ("--reward iou", "iou is not NAME=WEIGHT"),
    ("--reward iou=inf", "iou=inf is not NAME=WEIGHT"),
    ("--reward iou=1e39", "iou=1e39 is not NAME=WEIGHT"),
    ("--steps 2 --epochs 1", "not allowed with argument --steps"),
    ("--loss mean", "--loss"),
    ("--minibatches 3", "--prompts 8 is not a multiple of 1 processes times --minibatches 3"),
])
def test_a_mistake_is_one_line_and_exit_status_2(
        run: Run, tiny_checkpoint: Path, tmp_path: Path, flags: str, words: str) -> None:
    init = [] if "--init" in flags else ["--init", tiny_checkpoint]
    script = run("rft.py", *init, "--out", tmp_path / "out", *flags.split(), cwd=tmp_path)
    assert script.returncode == 2 and words in script.stderr, script.stderr
    assert len(script.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [
    "--lr nan", "--lr -1", "--lr inf", "--lr 0", "--temperature nan", "--temperature inf",
    "--temperature 0", "--alpha 0", "--alpha -1", "--epochs 0", "--epochs nan",
    "--seed 9999999999999999", "--epochs 1e308", "--alpha 1e-320",
    "--seed -1", "--val -1", "--beta nan",
    "--beta -1", "--clip -1 2", "--clip nan 2",
    "--resample -1", "--minibatches 0",
])
def test_a_number_that_makes_no_sense_is_one_line(
        capsys: pytest.CaptureFixture, flags: str) -> None:
    with pytest.raises(SystemExit) as leaving:
        rft.flags().parse_args(flags.split())
    assert leaving.value.code == 2
    name, value = flags.split()[:2]
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and f"{name}: {value} is not a" in errors[0]


def test_a_flag_of_several_values_keeps_the_defaults_of_those_that_are_left_out() -> None:
    plain = rft.flags().parse_args([])
    assert (plain.plan, plain.gpus, plain.memory, plain.image) == (False, 1, 80, None)
    assert (plain.keep, plain.keep_weights, plain.lora, plain.lora_alpha) == (2, None, None, None)
    given = rft.flags().parse_args("--plan 8 24 --keep 3 5 --lora 4 --weighting off".split())
    assert (given.plan, given.gpus, given.memory, given.image) == (True, 8, 24, None)
    assert (given.keep, given.keep_weights, given.lora, given.lora_alpha) == (3, 5, 4, None)
    assert (given.weighting, given.lambdas) == ("off", (1.2, 1.0))
    sized = rft.flags().parse_args("--plan 1 24 800 600 --weighting mean 0.4 0".split())
    assert sized.plan is True and sized.image == [800, 600]
    assert (sized.weighting, sized.lambdas, sized.weight_of) == ("mean", [0.4, 0], "iou")
    hard = rft.flags().parse_args("--weighting consistency 1.2 1 iou_hard".split())
    assert (hard.lambdas, hard.weight_of) == ([1.2, 1], "iou_hard")


def test_weights_are_kept_in_one_order_whatever_the_users() -> None:
    """So the sum of the terms is the same to the bit, and a resume may name them otherwise."""
    flags = rft.flags().parse_args("--reward format=1 giou=2 iou=3".split())
    assert list(flags.reward) == ["iou", "giou", "format"]
