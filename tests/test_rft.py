"""rft.py: its objective by hand and by finite differences, and the whole stage as a user runs it."""
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
import rft
from model import QwenVL
from processor import Frame, Processor
from rft import advantages, policy_loss

# ------------------------------------------------------------------------------------------------------------------ advantages


def test_advantages_by_hand():
    # mean 0.5, standard deviation sqrt(((0.5)^2 + (0.5)^2) / 1) = 0.7071
    got = advantages(torch.tensor([[1.0, 0.0]]), torch.ones(1))
    assert torch.allclose(got, torch.tensor([[0.5, -0.5]]) / (0.5 ** 0.5 + 1e-4))
    assert torch.allclose(advantages(torch.tensor([[1.0, 0.0]]), torch.ones(1), divide_by_std=False), torch.tensor([[0.5, -0.5]]))


def test_the_better_rollout_has_the_positive_advantage_and_a_group_sums_to_zero():
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    a = advantages(rewards, torch.tensor([0.2, 1.0, 0.7, 0.3, 0.9]))
    assert (a.argmax(1) == rewards.argmax(1)).all() and (a.amax(1) > 0).all()
    assert torch.allclose(a.sum(1), torch.zeros(5), atol=1e-5)


def test_a_group_without_difference_has_advantage_exactly_zero():
    a = advantages(torch.tensor([[0.1, 0.1, 0.1], [0.3, 0.2, 0.1]]), torch.tensor([1.0, 0.5]))
    assert (a[0] == 0).all() and (a[1] != 0).any()


def test_weights_shift_between_groups_and_leave_the_size_of_the_step():
    rewards = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    plain, weight = advantages(rewards, torch.ones(4)), torch.tensor([0.2, 0.4, 0.8, 1.0])
    a = advantages(rewards, weight)
    assert torch.allclose(a.abs().sum(), plain.abs().sum())
    share = a.abs().sum(1) / plain.abs().sum(1)
    assert torch.allclose(share / share[3], weight)
    assert torch.equal(advantages(rewards, torch.zeros(4)), plain)                       # nothing left to scale: as without weights


# ------------------------------------------------------------------------------------------------------------------ loss

def test_clipping_by_hand():
    """Ratio 2 and 0.5 against 1 - 0.2 .. 1 + 0.3: a gain is cut at the bound, a loss is not."""
    for ratio, advantage, want in [(2.0, 1.0, 1.3), (2.0, -1.0, -2.0), (0.5, 1.0, 0.5), (0.5, -1.0, -0.8), (1.1, 1.0, 1.1)]:
        logp = torch.tensor([math.log(ratio)], requires_grad=True)
        loss, sums = policy_loss(logp, torch.zeros(1), None, torch.tensor([advantage]), n_tokens=1, clip=(0.2, 0.3))
        loss.backward()
        assert math.isclose(-loss.item(), want, rel_tol=1e-6)
        assert (logp.grad == 0) == (want in (1.3, -0.8)) and sums["clipped"] == float(want in (1.3, -0.8))


def test_at_ratio_one_the_gradient_is_reinforce():
    logp = torch.randn(7, requires_grad=True)
    advantage = torch.randn(7)
    loss, _ = policy_loss(logp, logp.detach(), None, advantage, n_tokens=20)
    loss.backward()
    assert torch.allclose(logp.grad, -advantage / 20)


def test_kl_by_hand_pulls_towards_the_reference():
    # k3 at log-ratio r = logp_ref - logp: exp(r) - r - 1, here r = 1 and r = -1; its gradient in logp is 1 - exp(r)
    logp = torch.tensor([-2.0, -1.0], requires_grad=True)
    loss, sums = policy_loss(logp, logp.detach(), torch.tensor([-1.0, -2.0]), torch.zeros(2), n_tokens=2, beta=0.5)
    loss.backward()
    assert math.isclose(sums["kl"].item(), (math.e - 2) + math.exp(-1), rel_tol=1e-5)
    assert torch.allclose(logp.grad, 0.5 / 2 * torch.tensor([1 - math.e, 1 - math.exp(-1)]))
    assert logp.grad[0] < 0 < logp.grad[1]                                               # a step down the loss moves both to the reference


def test_gradient_of_a_one_parameter_policy_matches_finite_differences():
    """Two tokens with logits (theta, 0): the objective written out once more in floats, without the code's names."""
    chosen, old, ref, adv = [0, 1, 1, 0], [-0.9, -0.4, -1.2, -0.6], [-0.7, -0.7, -0.6, -0.8], [0.7, -1.1, 0.4, -0.2]
    low, high, beta, n = 0.2, 0.25, 0.1, 9

    def objective(theta):
        total = 0.0
        for c, o, r, a in zip(chosen, old, ref, adv):
            logp = -math.log(1 + math.exp(-theta)) if c == 0 else -math.log(1 + math.exp(theta))
            ratio = math.exp(logp - o)
            total += min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a) - beta * (math.exp(r - logp) - (r - logp) - 1)
        return -total / n

    for theta in (-0.8, 0.0, 0.37, 1.5):
        t = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        logp = torch.stack((t, torch.zeros_like(t))).log_softmax(0)[chosen]
        loss, _ = policy_loss(logp, *(torch.tensor(x, dtype=torch.float64) for x in (old, ref, adv)), n, (low, high), beta)
        loss.backward()
        assert math.isclose(loss.item(), objective(theta), rel_tol=1e-9)
        assert math.isclose(t.grad.item(), (objective(theta + 1e-6) - objective(theta - 1e-6)) / 2e-6, rel_tol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ a step

def settings(**changes):
    args = vars(rft.flags().parse_args([])) | {"prompts": 4, "group": 3, "max_new_tokens": 12, "lr": 1e-4, "steps": 10, "device": "cpu"}
    return SimpleNamespace(**args | changes)


def one_step(monkeypatch, tiny_checkpoint, dior_root, tmp_path, **changes):
    """The gradient of one step on rewards that are made up from the text (a random model's boxes never parse), and its log line."""
    model, processor = QwenVL.from_pretrained(tiny_checkpoint, dtype=None), Processor.from_pretrained(tiny_checkpoint)
    grads = {}

    def grade(texts, prompts, records, args):
        boxes = torch.tensor([[[len(set(t)), 1.0, len(set(t)) + 9, 8.0] for t in group] for group in texts])
        reward = torch.tensor([[t.count("e") + sum(map(ord, t)) % 7 / 7 for t in group] for group in texts])
        return {"reward": reward, "iou": reward, "positional": reward, "format": reward}, boxes

    def keep(model, opt, lr, max_norm=1.0):
        grads.update({n: p.grad.clone() for n, p in model.named_parameters()})
        model.zero_grad()
        return 1.0

    monkeypatch.setattr(rft, "grade", grade)
    monkeypatch.setattr(rft.runtime, "update", keep)
    args = settings(out=str(tmp_path), **changes)
    questions = rft.questions_of(data.load("dior", dior_root, "train"), args, 0)
    prompts = [processor(data.open_image(r), r.text) for r in questions]
    line, _ = rft.train_step(model, None, None, processor, questions, prompts, args, 0)
    return grads, line


@pytest.mark.parametrize("changes", [{"micro_tokens": 10 ** 6}, {"micro_tokens": 400}])
def test_the_gradient_does_not_depend_on_the_micro_batch(monkeypatch, tiny_checkpoint, dior_root, tmp_path, changes):
    want, line = one_step(monkeypatch, tiny_checkpoint, dior_root, tmp_path, micro_tokens=1)
    got, other = one_step(monkeypatch, tiny_checkpoint, dior_root, tmp_path, **changes)
    assert line["advantage"] > 0 and math.isclose(line["loss"], other["loss"], abs_tol=1e-6)
    assert all((got[n] - want[n]).norm() <= 1e-4 * want[n].norm() for n in want)


def test_sampled_and_scored_log_probabilities_agree_and_temperature_is_in_both(monkeypatch, tiny_checkpoint, dior_root, tmp_path):
    for temperature in (1.0, 0.7):
        _, line = one_step(monkeypatch, tiny_checkpoint, dior_root, tmp_path, temperature=temperature)
        assert line["sampled_scored_max"] < 1e-4


def test_every_question_keeps_its_own_rewards(monkeypatch, tiny_checkpoint, dior_root):
    """More rollouts than questions: boxes are graded against the box of their own question."""
    records = data.load("dior", dior_root, "train")[:2]
    frames = [Frame(r.size, r.size, "absolute") for r in records]
    texts = [[f'<think>x</think><answer>{{"bbox_2d": {list(r.box)}}}</answer>'] * 2 + ["nothing"] for r in records]
    terms, boxes = rft.grade(texts, [SimpleNamespace(frame=f) for f in frames], records, settings())
    assert terms["iou"].tolist() == terms["format"].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert terms["reward"].tolist() == [[2, 2, 0], [2, 2, 0]] and boxes[:, 2].isnan().all()


def test_an_invalid_box_earns_no_reward_but_that_of_the_format():
    record = SimpleNamespace(box=(0.0, 0.0, 10.0, 10.0), size=(100, 100))
    frame = Frame((100, 100), (100, 100), "absolute")
    outside = '<think>x</think><answer>{"bbox_2d": [150, 150, 160, 160]}</answer>'
    terms, _ = rft.grade([[outside, "<answer>"]], [SimpleNamespace(frame=frame)], [record], settings())
    assert terms["iou"].tolist() == terms["positional"].tolist() == [[0, 0]] and terms["format"].tolist() == [[1, 0]]


def test_shuffled_weights_are_the_coherent_ones_dealt_out_anew():
    consistency = torch.tensor([0.1, 0.5, 0.9, 0.3])
    coherent = rft.group_weights(consistency, torch.ones(4), settings(weighting="coherent"), 0)
    dealt = [rft.group_weights(consistency, torch.ones(4), settings(weighting="shuffled"), step) for step in range(6)]
    assert all(torch.equal(d.sort()[0], coherent.sort()[0]) for d in dealt)
    assert len({tuple(d.tolist()) for d in dealt}) > 2


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
               "--micro-tokens", 800, "--max-new-tokens", 60, "--lr", 1e-4, "--val", 2, "--device", "cpu", "--weights", 1, 0.5, 0,
               *more, processes=processes)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_one_and_two_processes_train_alike_and_a_resume_goes_on_as_if_never_interrupted(run, taught, dior_root, tmp_path):
    whole = train(run, taught, dior_root, tmp_path / "one", "--steps", 3, "--every", 2)
    assert any(line["advantage"] > 0 for line in whole) and whole[-1]["unparsable"] < 1
    two = train(run, taught, dior_root, tmp_path / "two", "--steps", 3, "--every", 2, processes=2)
    for a, b in zip(whole, two):
        for name in ("reward", "loss", "grad_norm", "consistency", "entropy", "length"):
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


def test_a_reference_policy_starts_at_kl_zero_and_is_left(run, taught, dior_root, tmp_path):
    once, twice = ([line["kl"] for line in train(run, taught, dior_root, tmp_path / str(n), "--steps", 2, "--every", 2, "--beta", 0.1,
                                                 "--updates", n)] for n in (1, 2))
    assert once[0] < 1e-9 < once[1] and twice[0] > 1e-9                  # the second pass of a step is off policy already


@pytest.mark.parametrize("flags, words", [
    (["--data", "nothing"], "no data set is called"), (["--data", "dior", "--root", "nowhere"], "nowhere"),
    (["--init", "nowhere"], "no checkpoint at nowhere"), (["--group", 1], "--group 1"), (["--steps", "many"], "--steps"),
    (["--weighting", "sometimes"], "--weighting"), (["--unknown"], "--unknown"), (["--resume"], "--resume")])
def test_a_mistake_is_one_line_and_exit_status_2(run, tiny_checkpoint, tmp_path, flags, words):
    base = [] if "--init" in flags else ["--init", tiny_checkpoint]
    done = run("rft.py", *base, "--out", tmp_path / "out", *flags, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and words in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [
    "--lr nan", "--lr -1", "--lr inf", "--lr 0", "--temperature nan", "--temperature inf", "--temperature 0", "--tau 0", "--tau -1",
    "--workers -1", "--seed 9999999999999999", "--seed -1", "--val -1", "--weights nan 0 0", "--beta nan", "--beta -1", "--clip -1 2",
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
