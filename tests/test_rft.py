"""rft.py: its objective by hand and by finite differences, a step, and the whole stage."""
import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import pictures
import report
import reward
import rft
import runtime
from data import load, open_image
from model import QwenVL
from processor import Frame, Processor
from rft import advantages, policy_loss

Run = Callable[..., subprocess.CompletedProcess]
FORMAT = '<think>x</think><answer>{{"bbox_2d": {box}}}</answer>'


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

@pytest.mark.parametrize("ratio, advantage, gain, cut", [
    (2.0, 1.0, 1.3, True), (2.0, -1.0, -2.0, False), (0.5, 1.0, 0.5, False),
    (0.5, -1.0, -0.8, True), (1.1, 1.0, 1.1, False)])
def test_clipping_by_hand(ratio: float, advantage: float, gain: float, cut: bool) -> None:
    """Against 1 - 0.2 .. 1 + 0.3: a gain is cut at the bound, a loss is not."""
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    one = torch.ones(1)
    loss, sums = policy_loss(
        logp, torch.zeros(1), None, advantage * one, one, n_tokens=1, clip=(0.2, 0.3))
    loss.backward()
    assert math.isclose(-loss.item(), gain, rel_tol=1e-6)
    assert (logp.grad == 0) == cut and sums["clipped"] == float(cut)


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


CHOSEN = (0, 1, 1, 0)
OLD = (-0.9, -0.4, -1.2, -0.6)
REF = (-0.7, -0.7, -0.6, -0.8)
ADVANTAGE = (0.7, -1.1, 0.4, -0.2)
LOW, HIGH, N_TOKENS = 0.2, 0.25, 9


def objective(theta: float, weights: tuple[float, ...], beta: float) -> float:
    """The whole loss once more, in floats, of a policy with the logits (theta, 0)."""
    total = 0.0
    for chosen, old, ref, a, w in zip(CHOSEN, OLD, REF, ADVANTAGE, weights):
        logp = -math.log(1 + math.exp(-theta if chosen == 0 else theta))
        ratio = math.exp(logp - old)
        surrogate = min(ratio * a, min(max(ratio, 1 - LOW), 1 + HIGH) * a)
        kl = math.exp(ref - logp) - (ref - logp) - 1
        total += w * (surrogate - beta * kl)
    return -total / N_TOKENS


@pytest.mark.parametrize("theta", [-0.8, 0.0, 0.37, 1.5])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (2.6, 2.6, 0.5, 0.5), (3.0, 1.3, 0.0, 1.0)])
def test_the_gradient_of_a_one_parameter_policy_matches_finite_differences(
        weights: tuple[float, ...], beta: float, theta: float) -> None:
    t = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    logp = torch.stack((t, torch.zeros_like(t))).log_softmax(0)[list(CHOSEN)]
    old, ref, advantage, weight = (
        torch.tensor(values, dtype=torch.float64) for values in (OLD, REF, ADVANTAGE, weights))
    loss, sums = policy_loss(logp, old, ref, advantage, weight, N_TOKENS, (LOW, HIGH), beta)
    loss.backward()
    assert math.isclose(loss.item(), objective(theta, weights, beta), rel_tol=1e-9)
    rise = objective(theta + 1e-6, weights, beta) - objective(theta - 1e-6, weights, beta)
    assert math.isclose(t.grad.item(), rise / 2e-6, rel_tol=1e-5, abs_tol=1e-9)
    assert ("kl" in sums) == (beta > 0)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_gradients_are_linear_in_the_weights_and_none_flows_into_them(beta: float) -> None:
    random = torch.Generator().manual_seed(0)
    logp, old, ref, advantage = torch.randn(4, 12, generator=random, dtype=torch.float64)

    def gradient(weight: Tensor) -> Tensor:
        x = logp.clone().requires_grad_()
        loss, _ = policy_loss(x, old, ref, advantage, weight, 12, beta=beta)
        loss.backward()
        return x.grad
    a, b = torch.rand(2, 12, generator=random, dtype=torch.float64)
    assert torch.allclose(gradient(2 * a + 3 * b), 2 * gradient(a) + 3 * gradient(b))
    assert torch.allclose(gradient(a), a * gradient(torch.ones_like(a)))
    weight = a.clone().requires_grad_()
    gradient(weight)
    assert weight.grad is None


# ---------------------------------------------------------------- weights of groups

IOUS = torch.tensor([
    [0.5, 0.5, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.9, 0.9, 0.8, 0.0]])


def settings(**changes: Any) -> argparse.Namespace:
    """The flags of a small step without a reference."""
    flags = vars(rft.flags().parse_args([]))
    flags |= {"prompts": 4, "group": 3, "max_new_tokens": 12, "lr": 1e-4, "steps": 10}
    return argparse.Namespace(**flags | {"device": "cpu", "beta": 0.0} | changes)


# Of the last group the mean is 0.65 and the variance 0.1425.
@pytest.mark.parametrize("weighting, weights", [
    ("consistency", [math.exp(0.9 + 0.0625), 1.0, 3.0, math.exp(1.2 * 0.35 + 0.1425)]),
    ("mean", [math.exp(0.9), 1.0, 3.0, math.exp(1.2 * 0.35)]),
    ("variance", [math.exp(0.0625), 1.0, 1.0, math.exp(0.1425)]),
    ("off", [1.0, 1.0, 1.0, 1.0])])
def test_every_weighting_by_hand(weighting: str, weights: list[float]) -> None:
    computed = rft.group_weights(IOUS, settings(weighting=weighting), step=0)
    assert computed.tolist() == pytest.approx(weights)


def test_lambdas_are_the_users() -> None:
    args = settings(weighting="consistency", lambdas=[0.4, 2.0])
    first = rft.group_weights(IOUS, args, step=0)[0].item()
    assert first == pytest.approx(math.exp(0.4 * 0.75 + 2 * 0.0625))


def test_shuffled_weights_are_those_of_consistency_dealt_out_anew() -> None:
    plain = rft.group_weights(IOUS, settings(weighting="consistency"), step=0)
    dealt = [rft.group_weights(IOUS, settings(weighting="shuffled"), step) for step in range(6)]
    for weights in dealt:
        assert torch.equal(weights.sort()[0], plain.sort()[0])
    assert len({tuple(weights.tolist()) for weights in dealt}) > 2


def test_what_two_processes_gather_is_put_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    gathered = torch.tensor([0.0, 2.0, 4.0, 1.0, 3.0, 5.0])
    assert rft.by_place(gathered).tolist() == [0, 1, 2, 3, 4, 5]


# ---------------------------------------------------------------- grading

RECORD = SimpleNamespace(box=(0.0, 0.0, 10.0, 10.0), size=(100, 100))
FRAME = Frame((100, 100), (100, 100), "absolute")


def rollouts_of(texts: list[list[str]], records: list, frames: list[Frame]) -> rft.Rollouts:
    """Rollouts of which the texts alone matter."""
    return rft.Rollouts(records, [SimpleNamespace(frame=f) for f in frames], [], [], texts)


def test_every_question_keeps_its_own_rewards(dior_root: Path) -> None:
    """More rollouts than questions: boxes are graded against the box of their own question."""
    records = load("dior", dior_root, "train")[:2]
    frames = [Frame(r.size, r.size, "absolute") for r in records]
    texts = [[FORMAT.format(box=list(r.box))] * 2 + ["nothing"] for r in records]
    grades = rft.grade(rollouts_of(texts, records, frames), settings())
    assert grades.terms["iou"].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert grades.terms["format"].tolist() == [[1, 1, 0], [1, 1, 0]]
    # IoU, the positional term at its weight, format.
    perfect = 1 + 0.1 * 0.94860 + 1
    assert grades.rewards.flatten().tolist() == pytest.approx([perfect, perfect, 0] * 2, abs=1e-5)
    assert grades.boxes[:, 2].isnan().all()
    assert grades.valid.tolist() == [[True, True, False]] * 2


def test_an_invalid_box_earns_no_reward_but_that_of_the_format() -> None:
    outside = FORMAT.format(box=[150, 150, 160, 160])
    terms = rft.grade(rollouts_of([[outside, "<answer>"]], [RECORD], [FRAME]), settings()).terms
    assert terms["iou"].tolist() == terms["positional"].tolist() == [[0, 0]]
    assert terms["format"].tolist() == [[1, 0]]


def test_a_term_that_forgets_invalid_boxes_rewards_none(monkeypatch: pytest.MonkeyPatch) -> None:
    one = lambda pred, target, size: torch.ones(pred.shape[:2])  # noqa: E731
    monkeypatch.setitem(reward.TERMS, "one", one)
    texts = [[FORMAT.format(box=[1, 1, 2, 2]), "nothing"]]
    grades = rft.grade(rollouts_of(texts, [RECORD], [FRAME]), settings(reward={"one": 1.0}))
    assert grades.rewards.tolist() == [[1, 0]] and grades.terms["iou"].shape == (1, 2)


def test_a_term_of_the_wrong_shape_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reward.TERMS, "flat", lambda pred, target, size: pred.sum((-1, -2)))
    rollouts = rollouts_of([["a", "b"]], [RECORD], [FRAME])
    with pytest.raises(ValueError, match="flat has the shape .1,., not"):
        rft.grade(rollouts, settings(reward={"flat": 1.0}))


def test_groups_that_the_positional_term_alone_tells_apart() -> None:
    flat = torch.tensor([0.0, 0.0])
    steep = torch.tensor([0.2, 0.7])
    terms = {
        "iou": torch.stack((flat, steep, flat, flat)),
        "positional": torch.stack((steep, steep, flat, steep)),
        "format": torch.stack((flat, flat, steep, steep)),
    }
    weights = {"iou": 1.0, "positional": 0.1, "format": 1.0}
    assert rft.positional_alone(terms, weights).tolist() == [True, False, False, False]
    weights["format"] = 0.0
    assert rft.positional_alone(terms, weights).tolist() == [True, False, False, True]
    weights["positional"] = 0.0
    assert not rft.positional_alone(terms, weights).any()


# ---------------------------------------------------------------- a step

def grade_by_letters(rollouts: rft.Rollouts, args: argparse.Namespace) -> rft.Grades:
    """Rewards made up from the text, for a random model's boxes never parse."""
    boxes = []
    rewards = []
    for group in rollouts.texts:
        for text in group:
            letters = len(set(text))
            boxes.append([letters, 1.0, letters + 9, 8.0])
            rewards.append(text.count("e") + sum(map(ord, text)) % 7 / 7)
    value = torch.tensor(rewards).view(len(rollouts.texts), -1)
    terms = {"iou": value / 9, "positional": value, "format": value}
    return rft.Grades(value, terms, torch.tensor(boxes).view(*value.shape, 4))


@pytest.fixture
def one_step(
        monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, dior_root: Path,
) -> Callable[..., tuple[dict[str, Tensor], dict[str, Any]]]:
    """one_step(flag=value) -> the gradient of one step by parameter, and its log line."""
    def run_step(**changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        model = QwenVL.from_pretrained(tiny_checkpoint, dtype=None)
        policy = rft.Policy(model, Processor.from_pretrained(tiny_checkpoint), None, None)
        gradients = {}

        def keep_gradients(model: QwenVL, opt: None, lr: float) -> float:
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters()})
            model.zero_grad()
            return 1.0
        monkeypatch.setattr(rft, "grade", grade_by_letters)
        monkeypatch.setattr(runtime, "update", keep_gradients)
        args = settings(**changes)
        records = load("dior", dior_root, "train")
        batch = runtime.batch(records, 0, args.prompts, args.seed)
        prompts = [policy.processor(open_image(r), r.text) for r in batch]
        line, _, _ = rft.train_step(policy, batch, prompts, args, step=0)
        return gradients, line
    return run_step


@pytest.mark.parametrize("micro_tokens", [10 ** 6, 400])
def test_the_gradient_does_not_depend_on_the_micro_batch(
        one_step: Callable, micro_tokens: int) -> None:
    single, line = one_step(micro_tokens=1)
    cut, other_line = one_step(micro_tokens=micro_tokens)
    assert line["advantage"] > 0
    assert math.isclose(line["loss"], other_line["loss"], abs_tol=1e-6)
    for name, gradient in single.items():
        assert (cut[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_and_scored_log_probabilities_agree_at_the_sampling_temperature(
        one_step: Callable, temperature: float) -> None:
    _, line = one_step(temperature=temperature)
    assert line["sampled_scored_max"] < 1e-4


def run_main(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    """rft.main in this process, on the CPU."""
    monkeypatch.setattr(sys, "argv", ["rft.py", *map(str, flags), "--device", "cpu"])
    rft.main()


def read_log(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def test_a_term_of_ones_own_is_chosen_by_name_and_stands_in_every_log(
        monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, dior_root: Path, tmp_path: Path,
) -> None:
    """A term put into TERMS before main: flag, rollouts, metrics.jsonl, the report's curves."""
    width = lambda pred, target, size: (pred[..., 2] - pred[..., 0]) / size[..., 0]  # noqa: E731
    monkeypatch.setitem(reward.TERMS, "width", width)
    plain_sample = rft.sample

    def sample(*args: Any) -> rft.Rollouts:
        """Boxes that are 50 and 100 of the model's frame's 112 wide, whatever is said."""
        rollouts = plain_sample(*args)
        texts = [FORMAT.format(box=[0, 0, wide, 20]) for wide in (50, 100)]
        rollouts.texts = [texts for _ in rollouts.texts]
        return rollouts
    monkeypatch.setattr(rft, "sample", sample)
    out = tmp_path / "out"
    run_main(
        monkeypatch, "--data", "dior", "--root", dior_root, "--init", tiny_checkpoint, "--out", out,
        "--prompts", 2, "--group", 2, "--max-new-tokens", 4, "--val", 0, "--every", 2,
        "--steps", 2, "--reward", "width=0.5", "format=1")
    lines = read_log(out)
    for line in lines:
        assert line["width"] == pytest.approx((50 + 100) / 2 / 112)
        assert line["width_group_std"] > 0.1
        assert line["reward"] == pytest.approx(0.5 * line["width"] + line["format"])
        assert "positional" not in line and "positional_alone_advantage" not in line
    for row in read_log(out, "rollouts.jsonl"):
        assert row["reward"][0] < row["reward"][1] and len(row["width"]) == 2
    names = report.reward_curves(lines)[0]
    assert names == ("reward", "width", "format", "iou")
    curves = [(name, [(line["step"], line[name]) for line in lines]) for name in names]
    figure = pictures.curve(curves)
    assert all(f">{name}</span>" in figure for name in names)
    description = json.loads((out / "latest" / "run.json").read_text())
    assert description["flags"]["reward"] == {"width": 0.5, "format": 1.0}


def test_picture_and_log_come_before_the_checkpoint_and_a_last_gradient_must_be_finite(
        monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, tiny_checkpoint: Path,
        dior_root: Path, tmp_path: Path) -> None:
    def check_what_is_there(out: Path, step: int, *rest: Any) -> None:
        last = read_log(out)[-1]
        assert last["step"] == step and "val_mIoU" in last
        assert (out / f"rollouts_{step:06d}.png").exists()
    monkeypatch.setattr(runtime, "save", check_what_is_there)
    # The learning rate of the last of three steps is below 7e-5.
    last_is_nan = lambda model, opt, lr: math.nan if lr < 7e-5 else 1.0  # noqa: E731
    monkeypatch.setattr(runtime, "update", last_is_nan)
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
def train(taught: Path, dior_root: Path, run: Run) -> Callable[..., list[dict[str, Any]]]:
    """train(out, flag, value, ..., processes=2) -> the log of an RFT run."""
    def run_stage(
            out: Path, *flags: object, processes: int | None = None) -> list[dict[str, Any]]:
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


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors")


def same_line(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Are two log lines equal to the bit, seconds and memory aside?"""
    measured = {"seconds_rollout", "seconds_reward", "seconds_update", "peak_GiB"}
    return all(a[key] == b[key] for key in a.keys() - measured)


def assert_alike(
        one: list[dict[str, Any]], two: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    """Two logs agree in these figures to rounding."""
    for a, b in zip(one, two, strict=True):
        for name in names:
            assert math.isclose(a[name], b[name], rel_tol=1e-3, abs_tol=1e-5), (a["step"], name)


WEIGHTS = ("consistency_weight", "consistency_weight_min", "consistency_weight_max")


def test_one_and_two_processes_train_alike_and_a_resume_goes_on_as_if_never_interrupted(
        run: Run, train: Callable, tmp_path: Path) -> None:
    """With the defaults: consistency weights and a reference."""
    flags = ("--steps", 3, "--every", 2)
    one = tmp_path / "one"
    two = tmp_path / "two"
    whole = train(one, *flags)
    assert any(line["advantage"] > 0 for line in whole) and whole[-1]["unparsable"] < 1
    for line in whole:
        assert {name for name in line if name not in runtime.LOG_KEYS} == {
            "iou", "positional", "format",
            "iou_group_std", "positional_group_std", "format_group_std"}
    of_two = train(two, *flags, processes=2)
    names = ("reward", "loss", "grad_norm", "kl", "positional_alone_advantage", "entropy", "length")
    assert_alike(whole, of_two, (*names, *WEIGHTS))
    straight = weights(one / "latest")
    for name, tensor in weights(two / "latest").items():
        assert (tensor - straight[name]).abs().max() < 1e-3, name

    # As after a crash behind step 2: the resumed run is the uninterrupted one, bit for bit.
    shutil.rmtree(one / "step_000003")
    point_latest_at(one, 2)
    resumed = train(one, *flags, "--resume")
    assert [line["step"] for line in resumed] == [1, 2, 3]
    assert same_line(resumed[2], whole[2])
    for name, tensor in weights(one / "latest").items():
        assert torch.equal(tensor, straight[name]), name

    # Two processes' state is read by one.
    point_latest_at(two, 2)
    train(two, *flags, "--resume")
    for name, tensor in weights(two / "latest").items():
        assert (tensor - straight[name]).abs().max() < 1e-3, name

    rollouts = read_log(one, "rollouts.jsonl")
    assert len(rollouts) == 12
    assert len(rollouts[0]["texts"]) == len(rollouts[0]["reward"]) == 4
    assert (one / "rollouts_000002.png").exists()
    # eval.py finds the data and its root in the checkpoint.
    evaluation = run("eval.py", one, "--device", "cpu", "--max-new-tokens", 60)
    assert evaluation.returncode == 0, evaluation.stderr
    assert "mIoU" in evaluation.stdout
    row = json.loads(next(one.rglob("eval.json")).read_text())["rows"][0]
    assert row["data"] == "dior" and row["n"] == 4


@pytest.mark.parametrize("weighting", ["mean", "variance", "off", "shuffled"])
def test_every_weighting_on_two_processes_and_resumed(
        run: Run, train: Callable, tmp_path: Path, weighting: str) -> None:
    """Without a reference; the test above has the consistency weights."""
    flags = ("--steps", 2, "--every", 1, "--val", 0, "--beta", 0, "--weighting", weighting,
             "--lambdas", 0.9, 1)
    out = tmp_path / "one"
    one = train(out, *flags)
    two = train(tmp_path / "two", *flags, processes=2)
    assert_alike(one, two, ("reward", "loss", "grad_norm", *WEIGHTS))
    assert all("kl" not in line for line in one)
    spread = one[0]["consistency_weight_max"] - one[0]["consistency_weight_min"]
    assert (spread > 0) == (weighting != "off")

    straight = weights(out / "latest")
    shutil.rmtree(out / "step_000002")
    point_latest_at(out, 1)
    resumed = train(out, *flags, "--resume")
    assert same_line(resumed[1], one[1])
    for name, tensor in weights(out / "latest").items():
        assert torch.equal(tensor, straight[name]), name


def test_a_resume_with_other_terms_is_refused(run: Run, train: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(out, "--steps", 1, "--val", 0, "--beta", 0)
    script = run("rft.py", "--out", out, "--resume", "--steps", 2, "--reward", "iou=1", "giou=0.5")
    assert script.returncode == 2 and len(script.stderr.strip().splitlines()) == 1
    assert "--reward iou=1 giou=0.5, but the run" in script.stderr
    assert "has iou=1 positional=0.5 format=0;" in script.stderr


def test_epochs_are_turned_into_steps(train: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # 16 records, 4 a step.
    assert len(train(out, "--epochs", 0.5, "--val", 0)) == 2
    flags = json.loads((out / "latest" / "run.json").read_text())["flags"]
    assert flags["steps"] == 2 and flags["epochs"] is None
    assert len(train(out, "--resume", "--epochs", 0.75, "--val", 0)) == 3


def test_a_reference_policy_starts_at_kl_zero_and_is_left(
        train: Callable, tmp_path: Path) -> None:
    flags = ("--steps", 2, "--every", 2, "--beta", 0.1)
    once = [line["kl"] for line in train(tmp_path / "once", *flags)]
    twice = [line["kl"] for line in train(tmp_path / "twice", *flags, "--updates", 2)]
    assert once[0] < 1e-9 < once[1]
    # The second pass of a step is off policy already.
    assert twice[0] > 1e-9


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
    ("--weighting sometimes", "--weighting"),
    ("--unknown", "--unknown"),
    ("--resume", "--resume"),
    ("--reward iou=1 iuo=1", "no term is called 'iuo'"),
    ("--reward iou=1 iou=2", "iou comes twice"),
    ("--reward iou=much", "iou=much is not NAME=WEIGHT"),
    ("--reward iou", "iou is not NAME=WEIGHT"),
    ("--reward iou=inf", "iou=inf is not NAME=WEIGHT"),
    ("--steps 2 --epochs 1", "not allowed with argument --steps"),
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
    "--temperature 0", "--alpha 0", "--alpha -1", "--epochs 0", "--epochs nan", "--workers -1",
    "--seed 9999999999999999", "--seed -1", "--val -1", "--lambdas nan 0", "--beta nan",
    "--beta -1", "--clip -1 2", "--clip nan 2"])
def test_a_number_that_makes_no_sense_is_one_line(
        capsys: pytest.CaptureFixture, flags: str) -> None:
    with pytest.raises(SystemExit) as leaving:
        rft.flags().parse_args(flags.split())
    said = capsys.readouterr().err.strip().splitlines()
    name, value = flags.split()[:2]
    assert leaving.value.code == 2 and len(said) == 1 and f"{name}: {value} is not a" in said[0]


def test_weights_are_kept_in_one_order_whatever_the_users() -> None:
    """So the sum of the terms is the same to the bit, and a resume may name them otherwise."""
    flags = rft.flags().parse_args("--reward format=1 giou=2 iou=3".split())
    assert list(flags.reward) == ["iou", "giou", "format"]
