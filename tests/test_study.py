"""study/: the tables against cases worked by hand, what ablate.py runs, the gradients' signal."""
import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import rft
from conftest import Run
from data import load, open_image
from model import QwenVL
from qwen.processor import Processor
from readers.base import Record
from report import metrics
from study import ablate, gradient, paper, study
from toy import scenes

ROOT = Path(__file__).parents[1]
FRAME = {"original": [scenes.SIDE] * 2, "resized": [scenes.SIDE] * 2, "convention": "absolute"}


# ---------------------------------------------------------------- the tables

def write_scores(folder: Path, records: list[Record], exact: bool) -> None:
    """An arm's scores: exact boxes; or of forty 29 that are 0.4 times as wide as the target, one
    that touches nothing, and ten answers without a box.
    """
    texts = []
    for i, record in enumerate(records):
        x1, y1, x2, y2 = record.box
        box = [x1, y1, x2, y2] if exact else [x1, y1, 0.6 * x1 + 0.4 * x2, y2]
        if not exact and i == 29:
            box = [0, 0, 1, 1]
        texts.append(f'<think>a</think><answer>{{"bbox_2d": {box}}}</answer>')
    if not exact:
        texts[30:] = ["nothing"] * 10
    predictions = []
    for record, text in zip(records, texts):
        predictions.append({"id": record.id, "text": text, "frame": FRAME})
    folder.mkdir(parents=True)
    lines = [json.dumps(p) + "\n" for p in predictions]
    (folder / "predictions_x.jsonl").write_text("".join(lines))
    row = {**evaluation.score_predictions(records, predictions),
           **evaluation.details(records, predictions, "synth-tiny", None, records)}
    (folder / "eval.json").write_text(json.dumps({"rows": [row]}))


def write_log(arm: Path, name: str) -> None:
    """One step of training; the positional arm has a term that no other has."""
    step = {"step": 1, **dict.fromkeys(study.TRAINED, 0.25)}
    step |= {"reward": 0.1, "reward_group_std": 0.2}
    if name == "positional":
        step |= {"diamond": 0.5, "diamond_group_std": 0.125}
    if name == "sft":
        step = {"step": 1, "loss": 1.0}
    (arm / "done").touch()
    (arm / "metrics.jsonl").write_text(json.dumps(step) + "\n")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A study of two seeds, and the lines that study.py prints about it.

    Without the positional term the arm is exact in seed 0 and as SFT in seed 1; with it, in both.
    """
    out = tmp_path_factory.mktemp("study")
    records = list(load("synth-tiny", None, "test"))[:40]
    arms = ((0, "sft", False), (0, "iou", True), (1, "sft", False), (1, "iou", False),
            (0, "positional", True), (1, "positional", True))
    for seed, name, exact in arms:
        arm = out / "tiny" / str(seed) / name
        write_scores(arm / "eval_test", records, exact)
        write_log(arm, name)
    script = subprocess.run(
        [sys.executable, "study/study.py", out], capture_output=True, text=True, cwd=ROOT)
    assert script.returncode == 0, script.stderr
    return out, script.stdout.splitlines()


def cells_of(lines: list[str], name: str) -> list[str]:
    """The cells of the table's row that begins with this name."""
    row, = [line for line in lines if line.startswith(f"| {name} |")]
    return row.strip("| ").split(" | ")[1:]


def test_each_arm_is_compared_with_its_own_start(tables: tuple[Path, list[str]]) -> None:
    lines = tables[1]
    rows = [line for line in lines if line.startswith("| GRPO: IoU + format | 0 1 |")]
    # Over the seeds 1 and 0.29: as SFT, 29 of forty boxes have an IoU of 0.4.
    assert rows[0].startswith("| GRPO: IoU + format | 0 1 | 0.645 ±")
    assert "+0.710 [" in rows[0] and "; +0.000 [+0.000, +0.000]" in rows[0]
    assert "| 0.355 ± 0.502 |" in rows[0]


def test_what_a_term_adds_is_taken_over_all_seeds(tables: tuple[Path, list[str]]) -> None:
    cells = cells_of(tables[1], "+ positional minus GRPO: IoU + format")
    seeds, iou, hits, given, distance, _, missed, distance_missed = cells
    # One seed in two gains all that SFT lacked.
    assert seeds == "2"
    assert iou.startswith("+0.355 [") and iou.endswith("± 0.502")
    assert hits.startswith("+0.500 [") and given.startswith("+0.125 [")
    assert missed.startswith("+0.500 [") and missed.endswith("± 0.707")
    # Distances are over 70 pairs of boxes, of which 30 differ: 29 by 0.3 widths, one by a walk
    # to the corner.
    records = list(load("synth-tiny", None, "test"))[:40]
    narrow = sum(0.3 * (r.box[2] - r.box[0]) for r in records[:29])
    x1, y1, x2, y2 = records[29].box
    corner = math.dist(((x1 + x2) / 2, (y1 + y2) / 2), (0.5, 0.5))
    unit = scenes.SIDE * 2 ** 0.5
    assert abs(float(distance.split()[0]) + (narrow + corner) / 70 / unit) < 6e-4
    assert abs(float(distance_missed.split()[0]) + corner / 2 / unit) < 6e-4


def test_terms_that_only_one_arm_has_are_in_the_table(tables: tuple[Path, list[str]]) -> None:
    text = "\n".join(tables[1])
    assert "| reward | reward_group_std | diamond | diamond_group_std | no_overlap_groups |" in text
    assert ("| GRPO: IoU + format | 0.100 → 0.100 | 0.200 → 0.200 | - | - | 0.250 → 0.250 |"
            in text)
    assert ("| + positional | 0.100 → 0.100 | 0.200 → 0.200 | 0.500 → 0.500 | 0.125 → 0.125 "
            "| 0.250 → 0.250 |" in text)


def test_a_study_leaves_its_differences_and_a_figure(tables: tuple[Path, list[str]]) -> None:
    out = tables[0]
    assert (out / "study.png").exists() and (out / "study.md").exists()
    differences = json.loads((out / "study.json").read_text())
    assert [row[:4] for row in differences] == [
        ["tiny", "test", "iou", "0"], ["tiny", "test", "iou", "1"],
        ["tiny", "test", "positional", "0"], ["tiny", "test", "positional", "1"]]


def test_mistakes_about_a_study_are_one_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
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

    records = list(load("synth-tiny", None, "test"))[:40]
    write_scores(tmp_path / "a" / "teeny" / "0" / "iou" / "eval_test", records, exact=True)
    assert "no regime teeny; there are tiny, little, wide" in refusal(tmp_path / "a")
    write_scores(tmp_path / "b" / "tiny" / "0" / "riou" / "eval_test", records, exact=True)
    assert "no arm riou; there are base, sft, boxes" in refusal(tmp_path / "b")

    write_scores(tmp_path / "c" / "tiny" / "0" / "sft" / "eval_test", records, exact=True)
    scores = tmp_path / "c" / "tiny" / "0" / "iou" / "eval_test"
    write_scores(scores, records[:30], exact=True)
    assert "scores of 30 and 40 scenes cannot be compared" in refusal(tmp_path / "c")
    (scores / "eval.json").write_text((scores.parents[1] / "sft/eval_test/eval.json").read_text())
    (scores / "predictions_x.jsonl").unlink()
    assert "0 files predictions_*.jsonl" in refusal(tmp_path / "c")
    (scores / "eval.json").write_text("{}")
    assert "has no row of scores" in refusal(tmp_path / "c")


def test_contrasts_are_of_their_tables_arms() -> None:
    for table in ablate.TABLES.values():
        assert set(table.arms) <= set(ablate.ARMS) and set(table.regimes) <= set(ablate.REGIMES)
        assert table.blind in table.arms
        for pair in table.contrasts:
            assert set(pair) <= {"sft", "own", *table.arms}


def test_the_papers_table_has_a_row_a_stage_and_columns_a_data_set(tmp_path: Path) -> None:
    for i, name in enumerate(("dior", "geopix")):
        rows = []
        for j, stage in enumerate(("base", "sft", "rft")):
            scores = {metric: (i + j) / 10 for metric in paper.METRICS}
            ci = {metric: [0.0, 1.0] for metric in paper.METRICS}
            rows.append({"stage": stage, "data": name, "split": "test", "n": 7, **scores, "ci": ci})
        (tmp_path / f"eval_{name}").mkdir()
        (tmp_path / f"eval_{name}" / "eval.json").write_text(json.dumps({"rows": rows}))
    lines = paper.table(paper.read_rows(tmp_path)).splitlines()
    assert lines[0].startswith("| stage | dior test (7): Pr@0.5 |")
    assert len(lines) == 5 and lines[4].startswith("| rft | 0.200 [0.000, 1.000] |")
    assert lines[4].endswith("| 0.300 [0.000, 1.000] |")


# ---------------------------------------------------------------- ablate.py

def run_table(
        monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str, stop: int = 1,
        **settings: str) -> list[str]:
    """ablate.main with scripts that train nothing -> their command lines.

    A stage leaves the run.json of all its steps, or of one in `stop`.
    """
    commands = []

    def command(*words: object) -> None:
        commands.append(" ".join(map(str, words)))
        if words[0] == "study/study.py":
            return
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        if words[0] != "eval.py":
            (out / "step_1").mkdir(exist_ok=True)
            steps = int(words[words.index("--steps") + 1])
            run = {"step": steps // stop, "steps": steps}
            (out / "step_1" / "run.json").write_text(json.dumps(run))
            if not (out / "latest").exists():
                (out / "latest").symlink_to("step_1")

    for name in ("ARMS", "REGIMES", "SEEDS", "SFT", "RFT", "TEST", "OWN"):
        monkeypatch.setenv(name, settings.get(name, ""))
    monkeypatch.setenv("STUDY", str(folder / "a study"))
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["ablate.py", *names])
    monkeypatch.setattr(ablate, "command", command)
    monkeypatch.setattr(ablate, "write_coarse", lambda out: None)
    monkeypatch.setattr(ablate.signal, "signal", lambda *_: None)
    try:
        ablate.main()
    except SystemExit as leaving:
        # Stopped stages alone: mistakes are tested through refusal().
        assert leaving.code == 130
    return commands


def test_every_arm_is_trained_as_its_name_says(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = [arm for arm in ablate.ARMS if arm != "sft"]
    done = run_table(monkeypatch, tmp_path, ARMS=" ".join(arms), REGIMES="small", SEEDS="3",
                     SFT="7", RFT="5", TEST="9", OWN="--alpha 10 --lr 1")
    commands = {}    # folder of the arm -> the command that trained it
    for line in done:
        command, _, out = line.partition(" --out ")
        if command.startswith(("sft.py", "rft.py")):
            commands[Path(out).relative_to(tmp_path / "a study").as_posix()] = command
    folders = {f"small/3/{arm}" for arm in arms if arm != "base"}    # the base is only scored
    assert set(commands) == folders | {"sft_synth_0.1/3"}
    assert "--data synth:0.1 --init toy/base --steps 7 " in commands["sft_synth_0.1/3"]
    assert "--init toy/base --steps 5 --data synth-small" in commands["small/3/direct"]
    assert commands["small/3/giou"].endswith("--reward iou=1 format=1 giou=0.1 --weighting off")
    assert commands["small/3/iou"].endswith("--reward iou=1 format=1 --weighting off")
    assert commands["small/3/variance"].endswith("--seed 3 --weighting variance")
    assert commands["small/3/own"].endswith("--weighting off --alpha 10 --lr 1")
    for arm in ("longer", "consistency-longer"):
        init = f"--init {tmp_path}/a study/sft_synth_0.1/3 --steps 10 "
        assert init in commands[f"small/3/{arm}"]
    assert "--split rft --answer-only" in commands["small/3/boxes"]
    assert "--steps 50 " in commands["small/3/boxes"]
    for arm, command in commands.items():
        assert "--seed 3" in command, arm
        if command.startswith("rft.py"):    # rft.py accepts the flags
            rft.flags().parse_args(command.replace("a study", "study").split()[1:])


@pytest.mark.parametrize("names, settings, message", [
    ((), {"ARMS": "iou riou"}, "ARMS: there is no riou; use some of base, boxes, direct, iou"),
    ((), {"REGIMES": "teeny"}, "REGIMES: there is no teeny; use some of tiny, little, wide"),
    ((), {"ARMS": "own"}, "the arm own needs OWN: flags of rft.py"),
    ((), {"SFT": "few"}, "SFT=few is not a whole number"),
    (("rewards",), {}, "no table rewards; give one of start, reward, weight"),
    (("start", "map"), {}, "no table start map; give one of"),
])
def test_mistakes_are_refused_before_training(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        names: tuple[str, ...], settings: dict[str, str], message: str) -> None:
    with pytest.raises(AssertionError):    # exit status 2, not 130
        run_table(monkeypatch, tmp_path, *names, **settings)
    error = capsys.readouterr().err
    assert error.startswith(f"ablate.py: {message}") and error.count("\n") == 1
    assert not (tmp_path / "a study").exists()


def test_a_table_trains_and_scores_its_arms(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, table in ablate.TABLES.items():
        scored = {}    # (regime, arm, folder) -> the command that scored it
        for command in run_table(monkeypatch, tmp_path / name, name, SEEDS="1", TEST="30"):
            if command.startswith("eval.py"):
                folder = Path(command.rpartition(" --out ")[2])
                regime, _, arm, kind = folder.relative_to(tmp_path / name / "a study").parts
                scored[regime, arm, kind] = command
        assert {regime for regime, _, _ in scored} == set(table.regimes)
        assert {arm for _, arm, _ in scored} == {"sft", *table.arms}
        for regime in table.regimes:
            for arm in table.arms:
                final = scored[regime, arm, "eval_final"]
                assert f"--data {ablate.REGIMES[regime].data} --split final --limit 30 " in final
                assert "--temperature" not in final
                assert "--temperature 1 " in scored[regime, arm, "eval_final_T1"]
                assert "--data synth --split novel " in scored[regime, arm, "eval_novel"]
            assert "--temperature 0.6 " in scored[regime, "sft", "eval_final_T0.6"]
            blind = [key for key in scored if key[0] == regime and key[2] == "eval_final_blind"]
            assert blind == [(regime, table.blind, "eval_final_blind")]
            assert "--blind " in scored[blind[0]]


def test_arms_of_a_table_have_the_same_questions_and_steps(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for those with twice the steps and for SFT on boxes."""
    flags = set()
    for command in run_table(monkeypatch, tmp_path, SEEDS="2", REGIMES="small"):
        if command.startswith("rft.py") and "longer" not in command:
            args = rft.flags().parse_args(command.replace("a study", "study").split()[1:])
            flags.add((args.steps, args.prompts, args.group, args.data, args.seed, args.lr))
    assert len(flags) == 1


def test_an_arm_that_was_stopped_resumes_and_finished_work_is_not_repeated(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"SEEDS": "0", "REGIMES": "small", "ARMS": "iou", "RFT": "4", "TEST": "9"}
    stopped = run_table(monkeypatch, tmp_path, stop=2, **settings)
    # A stage that is stopped exits with status 0, but is not finished.
    assert "the same command resumes" in capsys.readouterr().err and len(stopped) == 1
    assert not (tmp_path / "a study/sft_synth_0.1/0/done").exists()
    whole = run_table(monkeypatch, tmp_path, **settings)
    assert whole[0].startswith("sft.py") and whole[0].endswith("--resume")
    assert not any("--resume" in command for command in whole[1:])
    again = run_table(monkeypatch, tmp_path, **settings)
    assert len(again) == 1 and again[0].startswith("study/study.py")
    # More scenes are scored without training.
    more = run_table(monkeypatch, tmp_path, **{**settings, "TEST": "10"})
    assert len(more) == len([c for c in whole if c.startswith("eval.py")]) + 1
    assert all("--limit 10 " in command for command in more[:-1])


def test_ablate_sh_runs_ablate_py() -> None:
    done = subprocess.run(
        ["bash", "study/ablate.sh", "rewards"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PY": sys.executable})
    assert done.returncode == 2 and done.stderr.startswith("ablate.py: no table rewards")


def test_boxes_of_the_coarse_sft_are_moved(tmp_path: Path) -> None:
    rng = random.Random(0)
    shifts = []
    for _ in range(2000):
        x1, y1, x2, y2 = ablate.moved((400.0, 300.0, 410.0, 320.0), (1000, 1000), rng)
        assert x2 - x1 == pytest.approx(10, abs=0.02) and y2 - y1 == pytest.approx(20, abs=0.02)
        shifts.append(((x1 - 400) / 10, (y1 - 300) / 20))
    assert np.mean(shifts, 0) == pytest.approx([0, 0], abs=0.05)
    assert np.std(shifts, 0) == pytest.approx([ablate.SPREAD] * 2, rel=0.05)
    for _ in range(100):
        x1, y1, x2, y2 = ablate.moved((0.0, 40.0, 90.0, 112.0), (112, 112), rng)
        assert 0 <= x1 < x2 <= 112 and 0 <= y1 < y2 <= 112

    ablate.write_coarse(tmp_path / "coarse")
    written = load("jsonl", tmp_path / "coarse", "train")
    true = load("synth:0.1", None, "sft")
    assert [r.text for r in written] == [r.text for r in true] and not written.refused
    assert sum(r.box == t.box for r, t in zip(written, true)) == 0
    picture = np.asarray(open_image(written[0]))
    assert np.array_equal(picture, np.asarray(open_image(true[0])))


# ---------------------------------------------------------------- the map

def test_a_map_is_in_the_figure(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    records = list(load("synth-one", None, "final"))[:40]
    for arm, exact in (("sft", False), ("iou", False), ("positional", True)):
        write_scores(tmp_path / "one/0" / arm / "eval_final", records, exact)
    monkeypatch.setattr(sys, "argv", ["study.py", str(tmp_path)])
    study.main()
    titles = re.findall("^## (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert titles == ["map"] and (tmp_path / "study.png").exists()


def test_guesses_are_in_the_table(tmp_path: Path) -> None:
    records = list(load("synth", None, "final"))[:40]
    for arm in ("sft", "iou", "direct"):
        write_scores(tmp_path / "little/0" / arm / "eval_final", records, exact=True)
    write_scores(tmp_path / "little/0/direct/eval_final_blind", records, exact=False)
    text, bars, _ = study.chapter("start", ablate.TABLES["start"], tmp_path / "little")
    blind = cells_of(text.splitlines(), "GRPO from the base, without seeing the image")
    assert blind[1] == "0.290"
    centre = cells_of(text.splitlines(), "a box of the median size in the middle")
    assert centre[1] == f"{metrics.centre_box(records)['mIoU']:.3f}"
    assert [label for label, _ in bars] == [
        "GRPO: IoU + format minus GRPO from the base, final",
        "GRPO: IoU + format minus CoT-SFT, final"]


def test_misses_are_near_another_thing_or_elsewhere() -> None:
    record = next(r for r in load("synth", None, "val") if len(r.image.objects) > 3)
    x1, y1, x2, y2 = record.box
    width = x2 - x1
    other = next(o for o in record.image.objects if o.box != record.box)
    assert study.kind_of_miss(record, record.box) is None
    assert study.kind_of_miss(record, None) == "no box"
    assert study.kind_of_miss(record, other.box) == "another thing"

    alone = replace(record, image=replace(record.image, objects=()))
    # The kernel's deviation is 1.25 widths: two of them are 2.5 widths.
    for widths, kind in ((0.6, "near"), (2.4, "near"), (2.6, "elsewhere")):
        shifted = (x1 + widths * width, y1, x2 + widths * width, y2)
        assert study.kind_of_miss(alone, shifted) == kind


def test_the_terms_share_of_the_update_is_what_changes_without_it() -> None:
    iou = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    positional = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    rewards = {"iou": iou, "positional": positional, "format": torch.ones(2, 2)}
    weights = {"iou": 1.0, "positional": 0.2, "format": 1.0}
    # Undivided, advantages are -0.1, 0.1 with the term and 0, 0 without in the first group,
    # -0.4, 0.4 and -0.5, 0.5 in the second.
    share = study.positional_share(rewards, weights, divide=False)
    assert share == pytest.approx((0.2 + 0.2) / (0.2 + 0.8))
    # Divided, the first group moves as much as the second, in which advantages stay.
    assert study.positional_share(rewards, weights, divide=True) == pytest.approx(0.5, abs=1e-3)
    assert study.positional_share({"iou": iou, "positional": iou}, {"iou": 1.0, "positional": 0.0},
                                   divide=True) == 0


def test_the_map_has_a_row_for_each_regime(tmp_path: Path) -> None:
    records = list(load("synth-one", None, "final"))[:40]
    for arm, exact in (("sft", False), ("iou", False), ("positional", True)):
        write_scores(tmp_path / "one/0" / arm / "eval_final", records, exact)
    arm = tmp_path / "one/0/positional"
    write_log(arm, "positional")
    rollouts = {"iou": [0.0, 0.0], "positional": [0.0, 0.5], "format": [1.0, 1.0]}
    (arm / "rollouts.jsonl").write_text(json.dumps(rollouts) + "\n")
    (arm / "latest").mkdir()
    reward = {"iou": 1.0, "positional": 0.1, "format": 1.0}
    run = {"flags": {"reward": reward, "no_std": False}}
    (arm / "latest/run.json").write_text(json.dumps(run))
    text, [(label, effect)] = study.map_chapter([tmp_path / "one"])
    assert effect.mean == pytest.approx(0.71) and label.startswith("one: one thing alone")
    cells = cells_of(text.splitlines(), "one: one thing alone")
    assert cells[0] == "1" and cells[1] == "0.290"
    # 29 boxes 0.4 as wide as their target, one in the corner, ten answers without a box.
    assert cells[2] == "0.72 / 0.00 / 0.03 / 0.25"
    assert cells[3] == "0.250" and cells[4] == "1.000" and cells[5] == "0.250"
    assert cells[6].startswith("+0.710 [")
    assert cells[7] == "0.632" and cells[8] == "1.000" and cells[9].startswith("x 1.58")


# ---------------------------------------------------------------- the figure

def test_the_figure_is_gray_and_shows_every_group(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bars = [("a rather long name of an arm minus another arm, final",
             study.Effect(0.005, -0.01, 0.02, [0.0, 0.01])),
            ("short", study.Effect(0.07, 0.05, 0.09, [0.07]))]
    heights = []
    for groups in ([("reward, small", bars)], [("reward, small", bars), ("weight, small", bars)]):
        study.draw(groups, tmp_path / "1.png")
        pixels = np.asarray(Image.open(tmp_path / "1.png").convert("RGB")).astype(int)
        assert np.ptp(pixels, 2).max() == 0 and pixels.min() == 0
        heights.append(len(pixels))
    assert heights[1] > heights[0] + 80


# ---------------------------------------------------------------- signal and noise

def test_signal_and_noise_are_separated() -> None:
    rng = torch.Generator().manual_seed(0)
    # The true gradient has length 3, the noise below length 20.
    true = torch.zeros(400)
    true[:3] = torch.tensor([2.0, 1.0, -2.0])
    noisy = true + torch.randn(300, 400, generator=rng)
    (signal, error), progress = gradient.estimate(noisy, noisy)
    assert abs(signal - 9 / 409) < 3 * error < 0.02
    assert progress == (signal, error)
    # A reward that has nothing to do with the target makes no progress.
    unrelated = torch.randn(300, 400, generator=rng) + true.roll(100)
    _, (progress, error) = gradient.estimate(unrelated, noisy)
    assert abs(progress) < 3 * error


def test_adams_division_by_the_same_batches_is_biased_upwards() -> None:
    """The warning of the docstring: rewards that teach nothing seem to, where noise is skewed."""
    rng = torch.Generator().manual_seed(1)
    skewed = torch.empty(8, 4000).exponential_(generator=rng) - 1
    (raw, _), _ = gradient.estimate(skewed, skewed)
    cells = gradient.table({gradient.TARGET: skewed}).splitlines()[2].split(" | ")
    assert abs(raw) < 0.01 < 0.03 < float(cells[3].split()[0])
    assert abs(float(cells[1].split()[0]) - raw) < 6e-4


def iou_in_image(a: list[float], b: list[float]) -> float:
    """Of boxes in an image of side scenes.SIDE; the second is cut at its edges."""
    b = [min(v, scenes.SIDE) for v in b]
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area_a + area_b - width * height)


def test_a_variants_gradient_is_that_of_its_own_objective(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """For the mean IoU by hand: each answer's log-probability times its IoU above the mean."""
    model = QwenVL.from_pretrained("toy/base", torch.float32)
    model.visual.requires_grad_(False)
    policy = rft.Policy(model, Processor.from_pretrained("toy/base"), None, None)
    records = load("synth", None, "val")[:2]
    args = rft.flags().parse_args(["--temperature", "0.7"])
    # Each answer is moved by so much from the target; (200, 200) leaves the image.
    shifts = [[(0, 0), (3, 1), (200, 200)], [(1, 1), (9, 0), (2, 5)]]
    texts = []
    ious = []
    for record, group in zip(records, shifts):
        boxes = [[v + shift[i % 2] for i, v in enumerate(record.box)] for shift in group]
        texts.append([f'<answer>{{"bbox_2d": {box}}}</answer>' for box in boxes])
        ious.append([iou_in_image(record.box, box) for box in boxes])
    completions = []
    for group in texts:
        completions.append([policy.processor.encode(text) for text in group])
    prompts = [policy.processor(open_image(r), r.text) for r in records]
    groups = []
    for parts in zip(records, prompts, completions, texts):
        groups.append(rft.Group(*parts[:3], [], parts[3], torch.zeros(3, dtype=torch.bool)))
    monkeypatch.setattr(rft, "sample", lambda *_: groups)
    gradients, means = gradient.gradients(policy, records, None, args)

    iou = torch.tensor(ious)
    assert iou[0, 2] == 0 < iou[0, 1] < iou[0, 0] == 1
    assert abs(means["iou"] - iou.mean().item()) < 1e-5
    logp, _ = model.score(prompts, completions, 0.7)
    lengths = [len(answer) for group in completions for answer in group]
    of_answers = [part.sum() for part in logp.split(lengths)]
    above_mean = (iou - iou.mean(1, keepdim=True)).flatten().tolist()
    objective = -sum(a * total for a, total in zip(above_mean, of_answers)) / len(logp)
    parts = torch.autograd.grad(objective, [p for p in model.parameters() if p.requires_grad])
    by_hand = torch.cat([g.flatten() for g in parts])
    torch.testing.assert_close(gradients[gradient.TARGET], by_hand, rtol=1e-3, atol=1e-7)

    # Where the reward is the IoU, undivided, and all weigh the same, these are one gradient.
    flags = "--temperature 0.7 --no-std --reward iou=1 positional=0 --weighting consistency 0 0"
    gradients, _ = gradient.gradients(
        policy, records, None, rft.flags().parse_args(flags.split()))
    same = ("total", "total without positional", "iou alone", "total, weighted by consistency")
    for name in same:
        torch.testing.assert_close(gradients[name], gradients[gradient.TARGET])
    dealt = gradients["total, dealt at random"] - gradients["total"]
    assert dealt.norm() > 0.1 * gradients["total"].norm()


def test_without_a_reward_there_is_no_gradient_to_measure(run: Run) -> None:
    script = run("study/gradient.py", "--init", "toy/base", "--data", "synth-tiny",
                 "--batches", 3, "--prompts", 2, "--group", 2, "--max-new-tokens", 8,
                 "--device", "cpu")
    assert script.returncode == 2
    assert "rewarded alike" in script.stderr and "Traceback" not in script.stderr
