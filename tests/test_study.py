"""The study: its tables against answers made by hand, its gradients against a known noise."""
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import rft
from model import QwenVL
from processor import Processor
from study import gradient, study
from toy import scenes

HERE = Path(__file__).parents[1]
Box = tuple[float, float, float, float]


def answer_text(box: list[float]) -> str:
    return f'<answer>{{"bbox_2d": {box}}}</answer>'


# ---------------------------------------------------------------- the tables

def write_scores(folder: Path, records: list[data.Record], texts: list[str]) -> None:
    """A folder of scores as eval.py leaves it, of these answers."""
    side = [scenes.SIDE, scenes.SIDE]
    frame = {"original": side, "resized": side, "convention": "absolute"}
    predictions = [{"id": r.id, "text": text, "frame": frame} for r, text in zip(records, texts)]
    lines = [json.dumps(prediction) + "\n" for prediction in predictions]
    row = {**evaluation.score(records, predictions),
           **evaluation.details(records, predictions, "synth-small", (None, records))}
    folder.mkdir(parents=True)
    (folder / "predictions_x.jsonl").write_text("".join(lines))
    (folder / "eval.json").write_text(json.dumps({"rows": [row]}))


def exact_answers(records: list[data.Record]) -> list[str]:
    return [answer_text(list(r.box)) for r in records]


def poor_answers(records: list[data.Record]) -> list[str]:
    """Of forty: 29 boxes 0.4 times as wide as the target, one that touches nothing, ten without."""
    texts = []
    for x1, y1, x2, y2 in (r.box for r in records[:29]):
        texts.append(answer_text([x1, y1, 0.6 * x1 + 0.4 * x2, y2]))
    return [*texts, answer_text([0, 0, 1, 1]), *["nothing"] * 10]


def write_log(folder: Path, line: dict[str, float]) -> None:
    """A finished training of one step."""
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, **line}) + "\n")
    (folder / "done").touch()


@pytest.fixture(scope="module")
def records() -> list[data.Record]:
    return list(data.load("synth-small", None, "test"))[:40]


@pytest.fixture(scope="module")
def small_study(
        tmp_path_factory: pytest.TempPathFactory, records: list[data.Record],
) -> tuple[Path, str]:
    """A study of three arms and two seeds, and what study.py prints of it.

    SFT's answers are poor; without the positional term they are exact for one seed and SFT's own
    for the other; with it they are exact for both.
    """
    folder = tmp_path_factory.mktemp("study")
    poor = poor_answers(records)
    exact = exact_answers(records)
    answers = {"sft": (poor, poor), "iou": (exact, poor), "positional": (exact, exact)}
    step = {**dict.fromkeys(study.TRAINING_KEYS, 0.25), "reward": 0.1, "reward_group_std": 0.2}
    own_term = {"diamond": 0.5, "diamond_group_std": 0.125}
    logs = {"sft": {"loss": 1.0}, "iou": step, "positional": step | own_term}
    for arm, by_seed in answers.items():
        for seed, texts in enumerate(by_seed):
            arm_folder = folder / "small" / str(seed) / arm
            write_scores(arm_folder / "eval_test", records, texts)
            write_log(arm_folder, logs[arm])
    command = [sys.executable, "study/study.py", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_study_compares_each_arm_with_its_own_start(small_study: tuple[Path, str]) -> None:
    folder, text = small_study
    lines = text.splitlines()
    # mIoU 1 and 0.29
    iou, = (line for line in lines if line.startswith("| GRPO: IoU + format | 0 1 | 0.645"))
    assert "; +0.000 [+0.000, +0.000]" in iou
    assert "+0.710 [" in iou
    assert "| 0.355 ± 0.502 |" in iou
    # A term that one arm alone has stands behind those of the arms before it.
    assert ("| reward | reward_group_std | diamond | diamond_group_std | no_overlap_groups |"
            in text)
    assert ("| GRPO: IoU + format | 0.100 → 0.100 | 0.200 → 0.200 | - | - | 0.250 → 0.250 |"
            in text)
    assert ("| + positional | 0.100 → 0.100 | 0.200 → 0.200 | 0.500 → 0.500 | 0.125 → 0.125 "
            "| 0.250 → 0.250 |") in text
    assert (folder / "study.png").exists()
    differences = json.loads((folder / "study.json").read_text())
    assert [row[:4] for row in differences] == [
        ["small", "test", "iou", "0"], ["small", "test", "iou", "1"],
        ["small", "test", "positional", "0"], ["small", "test", "positional", "1"]]


def test_what_a_term_adds_is_of_all_seeds_at_once(
        small_study: tuple[Path, str], records: list[data.Record],
) -> None:
    """One seed in two gains all that SFT lacked."""
    lines = small_study[1].splitlines()
    name = "| + positional minus GRPO: IoU + format | "
    row, = (line for line in lines if line.startswith(name))
    seeds, miou, hits, given, distance, _, missed, distance_missed = (
        row.removeprefix(name).split(" | "))
    assert seeds == "2"
    assert miou.startswith("+0.355 [") and miou.endswith("± 0.502")
    assert hits.startswith("+0.500 [")
    assert given.startswith("+0.125 [")
    assert missed.startswith("+0.500 [") and missed.endswith("± 0.707")
    # Centres come nearer: over 70 pairs of boxes, of which 30 differ.
    narrow = sum(0.3 * (r.box[2] - r.box[0]) for r in records[:29])
    x1, y1, x2, y2 = records[29].box
    corner = math.dist(((x1 + x2) / 2, (y1 + y2) / 2), (0.5, 0.5))
    diagonal = scenes.SIDE * 2 ** 0.5
    assert abs(float(distance.split()[0]) + (narrow + corner) / 70 / diagonal) < 6e-4
    assert abs(float(distance_missed.split()[0]) + corner / 2 / diagonal) < 6e-4


def test_mistakes_about_a_study_are_one_line(
        tmp_path: Path, records: list[data.Record], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
) -> None:
    def refusal(folder: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["study.py", str(folder)])
        with pytest.raises(SystemExit) as leaving:
            study.main()
        message = capsys.readouterr().err
        assert leaving.value.code == 2 and message.count("\n") == 1, message
        return message

    assert "run ablate.sh first" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty" / "little").mkdir(parents=True)
    assert "no scores in" in refusal(tmp_path / "empty")

    exact = exact_answers(records)
    write_scores(tmp_path / "a" / "tiny" / "0" / "iou" / "eval_test", records, exact)
    assert "no regime tiny; there are little, small, wide" in refusal(tmp_path / "a")
    write_scores(tmp_path / "b" / "small" / "0" / "riou" / "eval_test", records, exact)
    assert "no arm riou; there are sft, base, direct" in refusal(tmp_path / "b")

    write_scores(tmp_path / "c" / "small" / "0" / "sft" / "eval_test", records, exact)
    scores = tmp_path / "c" / "small" / "0" / "iou" / "eval_test"
    write_scores(scores, records[:30], exact[:30])
    assert "scores of 30 and 40 scenes can't be compared" in refusal(tmp_path / "c")
    (scores / "eval.json").write_text((scores.parents[1] / "sft/eval_test/eval.json").read_text())
    (scores / "predictions_x.jsonl").unlink()
    assert "0 files predictions_*.jsonl" in refusal(tmp_path / "c")
    (scores / "eval.json").write_text("{}")
    assert "has no row of scores" in refusal(tmp_path / "c")


# ---------------------------------------------------------------- ablate.sh

def ablate(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """study/ablate.sh with a stand-in for Python: it prints its arguments and trains nothing."""
    stand_in = folder / "python"
    stand_in.write_text('#!/bin/bash\necho "$@"\nmkdir -p "${@: -1}"\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "PY": str(stand_in), "STUDY": str(folder / "study"), **settings}
    return subprocess.run(["bash", "study/ablate.sh"], capture_output=True, text=True, cwd=HERE,
                          env=environment)


def test_every_arm_is_trained_as_its_name_says_and_has_a_name_in_the_tables(tmp_path: Path) -> None:
    arms = [arm for arm in study.ARMS if arm != "sft"]
    done = ablate(tmp_path, ARMS=" ".join(arms), REGIMES="small", SEEDS="3", SFT="7", RFT="5",
                  TEST="9", OWN="--alpha 10 --lr 1")
    assert done.returncode == 0, done.stderr
    commands = {}    # folder of the arm -> the command that trained it
    for line in done.stdout.splitlines():
        command, _, out = line.partition(" --out ")
        if command.startswith(("sft.py", "rft.py")):
            commands[Path(out).relative_to(tmp_path / "study").as_posix()] = command
    folders = {f"small/3/{arm}" for arm in arms if arm != "base"}    # the base is scored alone
    assert set(commands) == folders | {"sft_synth_0.1/3"}
    assert "--data synth:0.1 --init toy/base --steps 7 " in commands["sft_synth_0.1/3"]
    assert "rft.py --init toy/base --steps 5 --data synth-small" in commands["small/3/direct"]
    assert commands["small/3/giou"].endswith("--reward iou=1 format=1 giou=0.1 --weighting off")
    assert commands["small/3/iou"].endswith("--reward iou=1 format=1 --weighting off")
    assert commands["small/3/variance"].endswith("--seed 3 --weighting variance")
    assert commands["small/3/own"].endswith("--weighting off --alpha 10 --lr 1")
    for arm in ("longer", "consistency-longer"):
        assert f"--init {tmp_path}/study/sft_synth_0.1/3 --steps 10 " in commands[f"small/3/{arm}"]
    assert "--split rft --answer-only" in commands["small/3/boxes"]
    for arm, command in commands.items():
        assert "--seed 3" in command, arm
        if command.startswith("rft.py"):    # the stage's own parser takes them
            rft.flags().parse_args(command.split()[1:])


@pytest.mark.parametrize("settings, message", [
    ({"ARMS": "iou riou"}, "no arm riou; there are base, direct, iou, giou"),
    ({"REGIMES": "tiny"}, "no regime tiny; there are little, small, wide"),
    ({"ARMS": "own"}, "OWN says what your variant changes, as flags of rft.py"),
    ({"PY": "no/python"}, "no no/python"),
])
def test_a_mistake_is_told_before_anything_is_trained(
        tmp_path: Path, settings: dict[str, str], message: str,
) -> None:
    done = ablate(tmp_path, **settings)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"ablate.sh: {message}") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------- the gradients

def test_signal_and_noise_are_told_apart() -> None:
    random = torch.Generator().manual_seed(0)
    true = torch.zeros(400)
    true[:3] = torch.tensor([2.0, 1.0, -2.0])    # length 3; the noise below has length 20
    noisy = true + torch.randn(300, 400, generator=random)
    (signal, error), progress = gradient.estimate(noisy, noisy)
    assert abs(signal - 9 / 409) < 3 * error < 0.02
    assert progress == (signal, error)
    # A reward that has nothing to do with the target.
    unrelated = torch.randn(300, 400, generator=random) + true.roll(100)
    _, (progress, error) = gradient.estimate(unrelated, noisy)
    assert abs(progress) < 3 * error
    # Adam's division comes from the same batches: rewards that teach nothing seem to, where noise
    # is skewed (the docstring's warning).
    skewed = torch.empty(8, 4000).exponential_(generator=random) - 1
    (signal, _), _ = gradient.estimate(skewed, skewed)
    row = gradient.table({gradient.TARGET: skewed}).splitlines()[2].split(" | ")
    assert abs(signal) < 0.01 < 0.03 < float(row[3].split()[0])
    assert abs(float(row[1].split()[0]) - signal) < 6e-4


def shifted(box: Box, shift: tuple[float, float]) -> list[float]:
    dx, dy = shift
    x1, y1, x2, y2 = box
    return [x1 + dx, y1 + dy, x2 + dx, y2 + dy]


def clamped_iou(a: Box, b: list[float]) -> float:
    """Of boxes in the image, whose side is scenes.SIDE; the second is cut at its edges."""
    b = [min(v, scenes.SIDE) for v in b]
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    intersection = width * height
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return intersection / (area_a + area_b - intersection)


def test_a_variants_gradient_is_that_of_its_own_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient for the mean IoU, by hand: the log-probability of each answer times its IoU
    above its group's mean."""
    model = QwenVL.from_pretrained(HERE / "toy" / "base", torch.float32)
    processor = Processor.from_pretrained(HERE / "toy" / "base")
    model.visual.requires_grad_(False)
    questions = data.load("synth", None, "val")[:2]
    # By so much the answers lie aside of the targets; (200, 200) leaves the image.
    shifts = [[(0, 0), (3, 1), (200, 200)], [(1, 1), (9, 0), (2, 5)]]
    texts = []
    completions = []
    iou = []
    for record, of_group in zip(questions, shifts):
        boxes = [shifted(record.box, shift) for shift in of_group]
        texts.append([answer_text(box) for box in boxes])
        completions.append([processor.encode(text) for text in texts[-1]])
        iou.append([clamped_iou(record.box, box) for box in boxes])
    iou = torch.tensor(iou)    # (Q, G)
    monkeypatch.setattr(rft, "rollout", lambda *_: (completions, None, texts))
    args = rft.flags().parse_args(["--temperature", "0.7"])
    gradients, means = gradient.gradients(model, processor, questions, None, args)
    assert iou[0, 2] == 0 < iou[0, 1] < iou[0, 0] == 1
    assert abs(means["iou"] - iou.mean().item()) < 1e-5

    prompts = [processor(data.open_image(r), r.text) for r in questions]
    logp, _ = model.score(prompts, completions, 0.7)
    lengths = [len(c) for c in (*completions[0], *completions[1])]
    advantages = (iou - iou.mean(1, keepdim=True)).flatten().tolist()
    gain = sum(a * part.sum() for a, part in zip(advantages, logp.split(lengths)))
    trained = [p for p in model.parameters() if p.requires_grad]
    by_hand = torch.autograd.grad(-gain / len(logp), trained)
    torch.testing.assert_close(gradients[gradient.TARGET],
                               torch.cat([g.flatten() for g in by_hand]), rtol=1e-3, atol=1e-7)

    # Where the reward is the IoU alone, undivided and unweighted, all variants are the target.
    args = rft.flags().parse_args(["--temperature", "0.7", "--no-std", "--reward", "iou=1",
                                   "positional=0", "--lambdas", "0", "0"])
    gradients, _ = gradient.gradients(model, processor, questions, None, args)
    total = gradients["total"]
    for name in ("total", "total without positional", "iou alone",
                 "total, weighted by consistency"):
        torch.testing.assert_close(gradients[name], gradients[gradient.TARGET])
    assert (gradients["total, dealt at random"] - total).norm() > 0.1 * total.norm()


def test_without_a_reward_there_is_no_gradient_to_measure(run: Callable) -> None:
    done = run("study/gradient.py", "--init", "toy/base", "--batches", 3, "--prompts", 2,
               "--group", 2, "--max-new-tokens", 8, "--device", "cpu")
    assert done.returncode == 2 and "rewarded alike" in done.stderr
    assert "Traceback" not in done.stderr
