"""rft.py: its objective by hand and by finite differences, and the whole stage as a user runs it."""
import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
import pictures
import report
import reward
import rft
from model import QwenVL
from processor import Frame, Processor
from rft import advantages, policy_loss

# ------------------------------------------------------------------------------------------------------------------ advantages


def test_advantages_by_hand():
    # mean 0.5, standard deviation sqrt(((0.5)^2 + (0.5)^2) / 1) = 0.7071
    got = advantages(torch.tensor([[1.0, 0.0]]))
    assert torch.allclose(got, torch.tensor([[0.5, -0.5]]) / (0.5 ** 0.5 + 1e-4))
    assert torch.allclose(advantages(torch.tensor([[1.0, 0.0]]), divide_by_std=False), torch.tensor([[0.5, -0.5]]))


def test_the_better_rollout_has_the_positive_advantage_and_a_group_sums_to_zero():
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    a = advantages(rewards)
    assert (a.argmax(1) == rewards.argmax(1)).all() and (a.amax(1) > 0).all()
    assert torch.allclose(a.sum(1), torch.zeros(5), atol=1e-5)


def test_a_group_without_difference_has_advantage_exactly_zero():
    a = advantages(torch.tensor([[0.1, 0.1, 0.1], [0.3, 0.2, 0.1]]))
    assert (a[0] == 0).all() and (a[1] != 0).any()


# ------------------------------------------------------------------------------------------------------------------ loss

def test_clipping_by_hand():
    """Ratio 2 and 0.5 against 1 - 0.2 .. 1 + 0.3: a gain is cut at the bound, a loss is not."""
    for ratio, advantage, want in [(2.0, 1.0, 1.3), (2.0, -1.0, -2.0), (0.5, 1.0, 0.5), (0.5, -1.0, -0.8), (1.1, 1.0, 1.1)]:
        logp = torch.tensor([math.log(ratio)], requires_grad=True)
        loss, sums = policy_loss(logp, torch.zeros(1), None, torch.tensor([advantage]), torch.ones(1), n_tokens=1, clip=(0.2, 0.3))
        loss.backward()
        assert math.isclose(-loss.item(), want, rel_tol=1e-6)
        assert (logp.grad == 0) == (want in (1.3, -0.8)) and sums["clipped"] == float(want in (1.3, -0.8))


def test_at_ratio_one_the_gradient_is_reinforce():
    logp = torch.randn(7, requires_grad=True)
    advantage = torch.randn(7)
    loss, _ = policy_loss(logp, logp.detach(), None, advantage, torch.ones(7), n_tokens=20)
    loss.backward()
    assert torch.allclose(logp.grad, -advantage / 20)


def test_kl_by_hand_pulls_towards_the_reference():
    # k3 at log-ratio r = logp_ref - logp: exp(r) - r - 1, here r = 1 and r = -1; its gradient in logp is 1 - exp(r)
    logp = torch.tensor([-2.0, -1.0], requires_grad=True)
    loss, sums = policy_loss(logp, logp.detach(), torch.tensor([-1.0, -2.0]), torch.zeros(2), torch.ones(2), n_tokens=2, beta=0.5)
    loss.backward()
    assert math.isclose(sums["kl"].item(), (math.e - 2) + math.exp(-1), rel_tol=1e-5)
    assert torch.allclose(logp.grad, 0.5 / 2 * torch.tensor([1 - math.e, 1 - math.exp(-1)]))
    assert logp.grad[0] < 0 < logp.grad[1]                                               # a step down the loss moves both to the reference


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (2.6, 2.6, 0.5, 0.5), (3.0, 1.3, 0.0, 1.0)])
def test_gradient_of_a_one_parameter_policy_matches_finite_differences(weights, beta):
    """Tokens with logits (theta, 0): the whole objective written out once more in floats, without the code's names."""
    chosen, old, ref, adv = [0, 1, 1, 0], [-0.9, -0.4, -1.2, -0.6], [-0.7, -0.7, -0.6, -0.8], [0.7, -1.1, 0.4, -0.2]
    low, high, n = 0.2, 0.25, 9

    def objective(theta):
        total = 0.0
        for c, o, r, a, w in zip(chosen, old, ref, adv, weights):
            logp = -math.log(1 + math.exp(-theta)) if c == 0 else -math.log(1 + math.exp(theta))
            ratio = math.exp(logp - o)
            total += w * (min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a) - beta * (math.exp(r - logp) - (r - logp) - 1))
        return -total / n

    for theta in (-0.8, 0.0, 0.37, 1.5):
        t = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        logp = torch.stack((t, torch.zeros_like(t))).log_softmax(0)[chosen]
        loss, sums = policy_loss(logp, *(torch.tensor(x, dtype=torch.float64) for x in (old, ref, adv, weights)), n, (low, high), beta)
        loss.backward()
        assert math.isclose(loss.item(), objective(theta), rel_tol=1e-9)
        assert math.isclose(t.grad.item(), (objective(theta + 1e-6) - objective(theta - 1e-6)) / 2e-6, rel_tol=1e-5, abs_tol=1e-9)
        assert ("kl" in sums) == (beta > 0)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_gradients_are_linear_in_the_weights_and_none_flows_into_them(beta):
    g = torch.Generator().manual_seed(0)
    logp, old, ref, adv = (torch.randn(12, generator=g, dtype=torch.float64) for _ in range(4))

    def gradient(weight):
        x = logp.clone().requires_grad_()
        loss, _ = policy_loss(x, old, ref, adv, weight, 12, beta=beta)
        loss.backward()
        return x.grad
    a, b = torch.rand(12, generator=g, dtype=torch.float64), torch.rand(12, generator=g, dtype=torch.float64)
    assert torch.allclose(gradient(2 * a + 3 * b), 2 * gradient(a) + 3 * gradient(b))
    assert torch.allclose(gradient(a), a * gradient(torch.ones_like(a)))
    weight = a.clone().requires_grad_()
    policy_loss(logp.clone().requires_grad_(), old, ref, adv, weight, 12, beta=beta)[0].backward()
    assert weight.grad is None


# ------------------------------------------------------------------------------------------------------------------ a step

def settings(**changes):
    args = vars(rft.flags().parse_args([])) | {"prompts": 4, "group": 3, "max_new_tokens": 12, "lr": 1e-4, "steps": 10, "device": "cpu",
                                               "beta": 0.0}
    return SimpleNamespace(**args | changes)


def one_step(monkeypatch, tiny_checkpoint, dior_root, **changes):
    """The gradient of one step on rewards that are made up from the text (a random model's boxes never parse), and its log line."""
    model = QwenVL.from_pretrained(tiny_checkpoint, dtype=None)
    policy = rft.Policy(model, Processor.from_pretrained(tiny_checkpoint), None, None)
    grads = {}

    def grade(rollouts, args):
        texts = rollouts.texts
        boxes = torch.tensor([[[len(set(t)), 1.0, len(set(t)) + 9, 8.0] for t in group] for group in texts])
        value = torch.tensor([[t.count("e") + sum(map(ord, t)) % 7 / 7 for t in group] for group in texts])
        return rft.Grades(value, {"iou": value / 9, "positional": value, "format": value}, boxes)

    def keep(model, opt, lr, max_norm=1.0):
        grads.update({n: p.grad.clone() for n, p in model.named_parameters()})
        model.zero_grad()
        return 1.0

    monkeypatch.setattr(rft, "grade", grade)
    monkeypatch.setattr(rft.runtime, "update", keep)
    args = settings(**changes)
    records = rft.runtime.batch(data.load("dior", dior_root, "train"), 0, args.prompts, args.seed)
    prompts = [policy.processor(data.open_image(r), r.text) for r in records]
    line, _, _ = rft.train_step(policy, records, prompts, args, 0)
    return grads, line


@pytest.mark.parametrize("changes", [{"micro_tokens": 10 ** 6}, {"micro_tokens": 400}])
def test_the_gradient_does_not_depend_on_the_micro_batch(monkeypatch, tiny_checkpoint, dior_root, changes):
    want, line = one_step(monkeypatch, tiny_checkpoint, dior_root, micro_tokens=1)
    got, other = one_step(monkeypatch, tiny_checkpoint, dior_root, **changes)
    assert line["advantage"] > 0 and math.isclose(line["loss"], other["loss"], abs_tol=1e-6)
    assert all((got[n] - want[n]).norm() <= 1e-4 * want[n].norm() for n in want)


def test_sampled_and_scored_log_probabilities_agree_and_temperature_is_in_both(monkeypatch, tiny_checkpoint, dior_root):
    for temperature in (1.0, 0.7):
        _, line = one_step(monkeypatch, tiny_checkpoint, dior_root, temperature=temperature)
        assert line["sampled_scored_max"] < 1e-4


def test_every_question_keeps_its_own_rewards(monkeypatch, tiny_checkpoint, dior_root):
    """More rollouts than questions: boxes are graded against the box of their own question."""
    records = data.load("dior", dior_root, "train")[:2]
    frames = [Frame(r.size, r.size, "absolute") for r in records]
    texts = [[f'<think>x</think><answer>{{"bbox_2d": {list(r.box)}}}</answer>'] * 2 + ["nothing"] for r in records]
    grades = rft.grade(said(texts, records, frames), settings())
    assert grades.terms["iou"].tolist() == grades.terms["format"].tolist() == [[1, 1, 0], [1, 1, 0]]
    perfect = 1 + 0.1 * 0.94860 + 1                                      # IoU, positional at its weight, format
    assert grades.rewards.flatten().tolist() == pytest.approx([perfect, perfect, 0] * 2, abs=1e-5)
    assert grades.boxes[:, 2].isnan().all() and grades.valid.tolist() == [[True, True, False]] * 2


def said(texts, records, frames):
    """Rollouts of which the texts alone matter."""
    return rft.Rollouts(records, [SimpleNamespace(frame=f) for f in frames], [], [], texts)


def test_an_invalid_box_earns_no_reward_but_that_of_the_format():
    record = SimpleNamespace(box=(0.0, 0.0, 10.0, 10.0), size=(100, 100))
    frame = Frame((100, 100), (100, 100), "absolute")
    outside = '<think>x</think><answer>{"bbox_2d": [150, 150, 160, 160]}</answer>'
    terms = rft.grade(said([[outside, "<answer>"]], [record], [frame]), settings()).terms
    assert terms["iou"].tolist() == terms["positional"].tolist() == [[0, 0]] and terms["format"].tolist() == [[1, 0]]


IOUS = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.9, 0.9, 0.8, 0.0]])


@pytest.mark.parametrize("weighting, want", [
    ("consistency", [math.exp(0.9 + 0.0625), 1.0, 3.0, math.exp(1.2 * 0.35 + 0.1425)]), ("mean", [math.exp(0.9), 1.0, 3.0, math.exp(0.42)]),
    ("variance", [math.exp(0.0625), 1.0, 1.0, math.exp(0.1425)]), ("off", [1.0] * 4)])
def test_every_weighting_by_hand(weighting, want):
    assert rft.group_weights(IOUS, settings(weighting=weighting), 0).tolist() == pytest.approx(want)


def test_lambdas_are_the_users():
    got = rft.group_weights(IOUS, settings(weighting="consistency", lambdas=[0.4, 2.0]), 0)
    assert got.tolist()[0] == pytest.approx(math.exp(0.4 * 0.75 + 2 * 0.0625))


def test_shuffled_weights_are_those_of_consistency_dealt_out_anew():
    plain = rft.group_weights(IOUS, settings(weighting="consistency"), 0)
    dealt = [rft.group_weights(IOUS, settings(weighting="shuffled"), step) for step in range(6)]
    assert all(torch.equal(d.sort()[0], plain.sort()[0]) for d in dealt)
    assert len({tuple(d.tolist()) for d in dealt}) > 2


def test_what_is_gathered_from_two_processes_is_put_by_place(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rft.by_place(torch.tensor([0.0, 2.0, 4.0, 1.0, 3.0, 5.0])).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_term_of_ones_own_is_chosen_by_name_and_stands_in_every_log(monkeypatch, tiny_checkpoint, dior_root, tmp_path):
    """A term put into TERMS before main: flag, rollouts, metrics.jsonl, the report's curves. No other edit."""
    monkeypatch.setitem(reward.TERMS, "wide", lambda pred, target, size: (pred[..., 2] - pred[..., 0]) / size[..., 0])
    monkeypatch.setattr(rft, "sample", said_boxes(rft.sample))
    flags = ["--data", "dior", "--root", dior_root, "--init", tiny_checkpoint, "--out", tmp_path / "out", "--prompts", 2, "--group", 2,
             "--max-new-tokens", 4, "--val", 0, "--every", 2, "--steps", 2, "--device", "cpu", "--reward", "wide=0.5", "format=1"]
    monkeypatch.setattr(sys, "argv", ["rft.py", *map(str, flags)])
    rft.main()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    rollouts = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    for line in lines:                                                   # boxes 50 and 100 of 112 wide in the model's frame
        assert line["wide"] == pytest.approx((50 + 100) / 2 / 112) and line["wide_group_std"] > 0.1
        assert line["reward"] == pytest.approx(0.5 * line["wide"] + line["format"])
        assert "positional" not in line and "positional_alone_advantage" not in line
    assert all(row["reward"][0] < row["reward"][1] and len(row["wide"]) == 2 for row in rollouts)
    assert report.reward_curves(lines)[0] == ("reward", "wide", "format", "iou")
    figure = pictures.curve([(k, [(x["step"], x[k]) for x in lines]) for k in report.reward_curves(lines)[0]])
    assert all(f">{name}</span>" in figure for name in ("reward", "wide", "format", "iou"))
    run = json.loads((tmp_path / "out" / "latest" / "run.json").read_text())
    assert run["flags"]["reward"] == {"wide": 0.5, "format": 1.0}


def said_boxes(sample):
    """rft.sample, with two texts in place of what a random model says: boxes of 50 and of 100 of the frame's width."""
    def replaced(*args):
        rollouts = sample(*args)
        texts = [f'<think>x</think><answer>{{"bbox_2d": [0, 0, {width}, 20]}}</answer>' for width in (50, 100)]
        rollouts.texts = [texts for _ in rollouts.texts]
        return rollouts
    return replaced


def test_a_term_of_the_wrong_shape_is_named(monkeypatch):
    monkeypatch.setitem(reward.TERMS, "flat", lambda pred, target, size: pred.sum((-1, -2)))
    record = SimpleNamespace(box=(0.0, 0.0, 10.0, 10.0), size=(100, 100))
    frame = Frame((100, 100), (100, 100), "absolute")
    with pytest.raises(ValueError, match="flat has the shape .1,., not"):
        rft.grade(said([["a", "b"]], [record], [frame]), settings(reward={"flat": 1.0}))


def test_a_term_that_forgets_invalid_boxes_rewards_none(monkeypatch):
    monkeypatch.setitem(reward.TERMS, "one", lambda pred, target, size: torch.ones(pred.shape[:2]))
    record = SimpleNamespace(box=(0.0, 0.0, 10.0, 10.0), size=(100, 100))
    frame = Frame((100, 100), (100, 100), "absolute")
    good = '<think>x</think><answer>{"bbox_2d": [1, 1, 2, 2]}</answer>'
    grades = rft.grade(said([[good, "b"]], [record], [frame]), settings(reward={"one": 1.0}))
    assert grades.rewards.tolist() == [[1, 0]] and grades.terms["iou"].shape == (1, 2)


def test_groups_that_the_positional_term_alone_tells_apart():
    flat, steep = torch.tensor([0.0, 0.0]), torch.tensor([0.2, 0.7])
    terms = {"iou": torch.stack((flat, steep, flat, flat)), "positional": torch.stack((steep, steep, flat, steep)),
             "format": torch.stack((flat, flat, steep, steep))}
    weights = {"iou": 1.0, "positional": 0.1, "format": 1.0}
    assert rft.positional_alone(terms, weights).tolist() == [True, False, False, False]
    assert rft.positional_alone(terms, weights | {"format": 0.0}).tolist() == [True, False, False, True]
    assert not rft.positional_alone(terms, weights | {"positional": 0.0}).any()


# ------------------------------------------------------------------------------------------------------------------ as a user runs it

@pytest.fixture(scope="module")
def taught(tiny_checkpoint, dior_root, tmp_path_factory, run):
    """A stage of sft.py that has learned to answer in the format: rewards are not all zero."""
    out = tmp_path_factory.mktemp("taught") / "sft"
    done = run("sft.py", "--data", "dior", "--root", dior_root, "--init", tiny_checkpoint, "--out", out, "--steps", 60, "--batch", 8,
               "--micro-tokens", 10 ** 6, "--lr", 5e-3, "--answer-only", "--val", 0, "--every", 60, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return out


def train(run, taught, dior_root, out, *more, processes=None):
    done = run("rft.py", "--data", "dior", "--root", dior_root, "--init", taught, "--out", out, "--prompts", 4, "--group", 4,
               "--micro-tokens", 800, "--max-new-tokens", 60, "--lr", 1e-4, "--val", 2, "--device", "cpu", "--reward", "iou=1",
               "positional=0.5", "format=0", *more, processes=processes)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_one_and_two_processes_train_alike_and_a_resume_goes_on_as_if_never_interrupted(run, taught, dior_root, tmp_path):
    whole = train(run, taught, dior_root, tmp_path / "one", "--steps", 3, "--every", 2)
    assert any(line["advantage"] > 0 for line in whole) and whole[-1]["unparsable"] < 1
    two = train(run, taught, dior_root, tmp_path / "two", "--steps", 3, "--every", 2, processes=2)
    for a, b in zip(whole, two):
        for name in ("reward", "loss", "grad_norm", "consistency_weight", "consistency_weight_min", "consistency_weight_max", "kl",
                     "positional_alone_advantage", "entropy", "length"):
            assert math.isclose(a[name], b[name], rel_tol=1e-3, abs_tol=1e-5), (a["step"], name)
    weights = [load_file(tmp_path / name / "latest" / "model.safetensors") for name in ("one", "two")]
    assert all((weights[0][n] - weights[1][n]).abs().max() < 1e-3 for n in weights[0])

    interrupted = tmp_path / "interrupted"
    (tmp_path / "one" / "step_000003").rename(tmp_path / "later")                        # as after a crash behind step 2
    (tmp_path / "one" / "latest").unlink()
    (tmp_path / "one" / "latest").symlink_to("step_000002")
    (tmp_path / "one").rename(interrupted)
    again = train(run, taught, dior_root, interrupted, "--steps", 3, "--every", 2, "--resume")
    assert [line["step"] for line in again] == [1, 2, 3]
    measured = {k for k in whole[2] if "seconds" in k or k == "peak_GiB"}
    assert all(again[2][k] == whole[2][k] for k in whole[2].keys() - measured)
    resumed, straight = (load_file(p / "model.safetensors") for p in (interrupted / "latest", tmp_path / "later"))
    assert all(torch.equal(resumed[n], straight[n]) for n in straight)                   # bit for bit

    (tmp_path / "two" / "latest").unlink()
    (tmp_path / "two" / "latest").symlink_to("step_000002")
    train(run, taught, dior_root, tmp_path / "two", "--steps", 3, "--every", 2, "--resume")             # two processes' state read by one
    other = load_file(tmp_path / "two" / "latest" / "model.safetensors")
    assert all((other[n] - straight[n]).abs().max() < 1e-3 for n in straight)

    rollouts = [json.loads(line) for line in (interrupted / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 12 and len(rollouts[0]["texts"]) == len(rollouts[0]["reward"]) == 4
    assert (interrupted / "rollouts_000002.png").exists()
    report = run("eval.py", interrupted, "--device", "cpu", "--max-new-tokens", 60)      # dior and its root are recorded
    assert report.returncode == 0, report.stderr
    assert "mIoU" in report.stdout
    row = json.loads(next(interrupted.rglob("eval.json")).read_text())["rows"][0]
    assert row["data"] == "dior" and row["n"] == 4


@pytest.mark.parametrize("weighting", ["mean", "variance", "off", "shuffled"])
def test_every_weighting_on_two_processes_and_resumed(run, taught, dior_root, tmp_path, weighting):
    """Without KL; the test above has the consistency weights and a reference."""
    flags = "--steps", 2, "--every", 1, "--val", 0, "--beta", 0, "--weighting", weighting, "--lambdas", 0.9, 1
    one = train(run, taught, dior_root, tmp_path / "one", *flags)
    two = train(run, taught, dior_root, tmp_path / "two", *flags, processes=2)
    for a, b in zip(one, two, strict=True):
        assert "kl" not in a
        for name in ("reward", "loss", "grad_norm", "consistency_weight", "consistency_weight_min", "consistency_weight_max"):
            assert math.isclose(a[name], b[name], rel_tol=1e-3, abs_tol=1e-5), (a["step"], name)
    assert (one[0]["consistency_weight_max"] > one[0]["consistency_weight_min"]) == (weighting != "off")
    straight = load_file(tmp_path / "one" / "latest" / "model.safetensors")
    shutil.rmtree(tmp_path / "one" / "step_000002")                                      # as after a crash behind step 1
    (tmp_path / "one" / "latest").unlink()
    (tmp_path / "one" / "latest").symlink_to("step_000001")
    again = train(run, taught, dior_root, tmp_path / "one", *flags, "--resume")
    assert all(again[1][k] == v for k, v in one[1].items() if "seconds" not in k and k != "peak_GiB")
    resumed = load_file(tmp_path / "one" / "latest" / "model.safetensors")
    assert all(torch.equal(resumed[n], straight[n]) for n in straight)                   # bit for bit
    if weighting == "shuffled":
        other = run("rft.py", "--out", tmp_path / "one", "--resume", "--reward", "iou=1", "giou=0.5", "--steps", 3)
        assert other.returncode == 2 and len(other.stderr.strip().splitlines()) == 1
        assert "--reward iou=1 giou=0.5, but the run" in other.stderr and "iou=1 positional=0.5 format=0" in other.stderr


def test_epochs_are_turned_into_steps(run, taught, dior_root, tmp_path):
    done = train(run, taught, dior_root, tmp_path / "out", "--epochs", 0.5, "--val", 0)
    assert len(done) == 2                                                # 16 records, 4 a step
    flags = json.loads((tmp_path / "out" / "latest" / "run.json").read_text())["flags"]
    assert flags["steps"] == 2 and flags["epochs"] is None
    assert len(train(run, taught, dior_root, tmp_path / "out", "--resume", "--epochs", 0.75, "--val", 0)) == 3


def test_a_reference_policy_starts_at_kl_zero_and_is_left(run, taught, dior_root, tmp_path):
    once, twice = ([line["kl"] for line in train(run, taught, dior_root, tmp_path / str(n), "--steps", 2, "--every", 2, "--beta", 0.1,
                                                 "--updates", n)] for n in (1, 2))
    assert once[0] < 1e-9 < once[1] and twice[0] > 1e-9                  # the second pass of a step is off policy already


@pytest.mark.parametrize("flags, words", [
    (["--data", "nothing"], "no data set is called"), (["--data", "dior", "--root", "nowhere"], "nowhere"),
    (["--init", "nowhere"], "no checkpoint at nowhere"), (["--group", 1], "--group 1"), (["--steps", "many"], "--steps"),
    (["--weighting", "sometimes"], "--weighting"), (["--unknown"], "--unknown"), (["--resume"], "--resume"),
    (["--reward", "iou=1", "iuo=1"], "no term is called 'iuo'"), (["--reward", "iou=1", "iou=2"], "iou comes twice"),
    (["--reward", "iou=much"], "iou=much is not NAME=WEIGHT"), (["--reward", "iou"], "iou is not NAME=WEIGHT"),
    (["--reward", "iou=inf"], "iou=inf is not NAME=WEIGHT"), (["--steps", 2, "--epochs", 1], "not allowed with argument --steps")])
def test_a_mistake_is_one_line_and_exit_status_2(run, tiny_checkpoint, tmp_path, flags, words):
    base = [] if "--init" in flags else ["--init", tiny_checkpoint]
    done = run("rft.py", *base, "--out", tmp_path / "out", *flags, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and words in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [
    "--lr nan", "--lr -1", "--lr inf", "--lr 0", "--temperature nan", "--temperature inf", "--temperature 0", "--alpha 0",
    "--alpha -1", "--epochs 0", "--epochs nan", "--workers -1", "--seed 9999999999999999", "--seed -1", "--val -1",
    "--lambdas nan 0", "--beta nan", "--beta -1", "--clip -1 2",
    "--clip nan 2"])
def test_a_number_that_makes_no_sense_is_one_line(capsys, flags):
    with pytest.raises(SystemExit) as leaving:
        rft.flags().parse_args(flags.split())
    said = capsys.readouterr().err.strip().splitlines()
    assert leaving.value.code == 2 and len(said) == 1 and f"{flags.split()[0]}: {flags.split()[1]} is not a" in said[0]


def test_picture_and_log_come_before_the_checkpoint_and_a_last_gradient_must_be_finite(monkeypatch, capfd, tiny_checkpoint, dior_root,
                                                                                      tmp_path):
    def seen(out, step, *rest):
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == step and "val_mIoU" in lines[-1] and (out / f"rollouts_{step:06d}.png").exists()
    monkeypatch.setattr(rft.runtime, "save", seen)
    monkeypatch.setattr(rft.runtime, "update", lambda model, opt, lr: math.nan if lr < 7e-5 else 1.0)    # the last of three
    flags = ["--data", "dior", "--root", dior_root, "--init", tiny_checkpoint, "--out", tmp_path / "out", "--prompts", 2, "--group", 2,
             "--max-new-tokens", 4, "--val", 1, "--every", 1, "--steps", 3, "--lr", 1e-4, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["rft.py", *map(str, flags)])
    with pytest.raises(SystemExit) as leaving:
        rft.main()
    assert leaving.value.code == 2 and "no gradient is finite from step 3 on" in capfd.readouterr().err


def test_an_output_that_stands_is_not_overwritten(run, taught, dior_root):
    before = sorted(p.name for p in taught.iterdir())
    done = run("rft.py", "--data", "dior", "--root", dior_root, "--init", taught, "--out", taught)
    assert done.returncode == 2 and "--resume" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert sorted(p.name for p in taught.iterdir()) == before
