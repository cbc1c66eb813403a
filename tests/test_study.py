"""study/: the tables against cases worked by hand, what ablate.py runs, the gradients' signal."""
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import rft
import sft
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
NAN = float("nan")


# ---------------------------------------------------------------- statistics

def test_the_quantiles_are_students() -> None:
    def area(t: float, freedom: int) -> float:
        """Of the density from 0 to t."""
        x = np.linspace(0, t, 20_001)
        constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
        density = constant / math.sqrt(freedom * math.pi) * (1 + x * x / freedom) ** (
            -(freedom + 1) / 2)
        return float(((density[1:] + density[:-1]) / 2).sum() * (x[1] - x[0]))

    assert len(study.T_975) == len(study.T_80) == 30
    for freedom in range(1, 31):
        assert area(study.T_975[freedom - 1], freedom) == pytest.approx(0.475, abs=5e-5)
        assert area(study.T_80[freedom - 1], freedom) == pytest.approx(0.3, abs=2e-4)


def test_the_interval_over_seeds_is_students() -> None:
    effect = study.Effect(dict(zip("01234", (0.1, 0.2, 0.3, 0.4, 0.5))), (0.0, 0.0))
    # The deviation is sqrt(0.1 / 4), the error of the mean sqrt(0.005); t is 2.776 and 0.941.
    error = math.sqrt(0.005)
    assert effect.mean == pytest.approx(0.3)
    assert effect.interval == pytest.approx((0.3 - 2.776 * error, 0.3 + 2.776 * error))
    assert effect.smallest == pytest.approx((2.776 + 0.941) * error)
    assert study.mean_text([0.1, 0.2, 0.3, 0.4, 0.5]) == "0.300 ± 0.196"

    alone = study.Effect({"0": 0.1}, (0.0, 0.2))
    assert alone.interval == (-math.inf, math.inf) and alone.smallest == math.inf
    assert study.interval_text(alone.interval) == "-" and study.mean_text([0.1]) == "0.100"


# ---------------------------------------------------------------- the tables

def answer(box: Sequence[float]) -> str:
    return f'<think>a</think><answer>{{"bbox_2d": {list(box)}}}</answer>'


def write_texts(folder: Path, records: Sequence[Record], texts: Sequence[Sequence[str]]) -> None:
    """Scores of an arm whose samples are these texts; the first of each record is its answer."""
    folder.mkdir(parents=True)
    lines = []
    for record, samples in zip(records, texts):
        line = {"id": record.id, "text": samples[0], "frame": FRAME}
        lines.append(json.dumps(line | ({"samples": samples} if len(samples) > 1 else {})) + "\n")
    (folder / "predictions_x.jsonl").write_text("".join(lines))
    (folder / "done").touch()


def write_boxes(folder: Path, records: Sequence[Record], exact: Sequence[bool]) -> None:
    """Exact boxes, or boxes that are 0.4 times as wide as the target."""
    texts = []
    for record, right in zip(records, exact):
        x1, y1, x2, y2 = record.box
        texts.append([answer([x1, y1, x2 if right else 0.6 * x1 + 0.4 * x2, y2])])
    write_texts(folder, records, texts)


def write_scores(folder: Path, records: list[Record], exact: bool) -> None:
    """Predictions and eval.json: exact boxes; or of forty 29 that are 0.4 times as wide as the
    target, one that touches nothing, and ten answers without a box.
    """
    texts = []
    for i, record in enumerate(records):
        x1, y1, x2, y2 = record.box
        box = [x1, y1, x2, y2] if exact else [x1, y1, 0.6 * x1 + 0.4 * x2, y2]
        texts.append(answer([0, 0, 1, 1] if not exact and i == 29 else box))
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


@pytest.fixture(scope="module")
def few() -> Iterator[dict[str, list[Record]]]:
    """Score -> its records, of worlds with few scenes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "scored_records", study.functools.cache(
            study.scored_records.__wrapped__))
        for world in scenes.WORLDS.values():
            for split in ("final", "val"):
                patch.setitem(world, split, replace(world[split], scenes=50))
        yield {name: study.scored_records(name)[:40] for name in ("final", "val", "tiny")}


def report(folder: Path, patch: pytest.MonkeyPatch) -> tuple[str, list[dict]]:
    """study.py's Markdown and differences."""
    patch.setattr(sys, "argv", ["study.py", str(folder)])
    study.main()
    return (folder / "study.md").read_text(), json.loads((folder / "study.json").read_text())


def cells_of(text: str, *names: str) -> list[str]:
    """The cells of the row that begins with these cells."""
    begin = f"| {' | '.join(names)} | "
    row, = [line for line in text.splitlines() if line.startswith(begin)]
    return row.removeprefix(begin).removesuffix(" |").split(" | ")


def test_differences_are_by_seed_on_places_and_names(
        tmp_path: Path, few: dict[str, list[Record]], monkeypatch: pytest.MonkeyPatch) -> None:
    records = few["final"]
    names = [record.kind in ("category", "attribute") for record in records]
    assert 5 < sum(names) < 35
    # CoT-SFT knows names. GRPO after it knows all in seed 0, half of the places in seed 1, and
    # nothing new in seed 2. In seed 3 it was not scored.
    places = [i for i, named in enumerate(names) if not named]
    half = [named or i in places[::2] for i, named in enumerate(names)]
    for seed, exact in enumerate((names, [True] * 40, half, names)):
        write_boxes(tmp_path / str(seed) / "cot/eval_final", records, names)
        if seed:
            write_boxes(tmp_path / str(seed - 1) / "cot-rft/eval_final", records, exact)
    write_boxes(tmp_path / "0/paper/eval_final", records, [True] * 40)
    # The ladder has five seeds, whatever other tables ran.
    for arm in ("cot", "cot-rft"):
        write_boxes(tmp_path / "7" / arm / "eval_final", records, [False] * 40)
    text, found = report(tmp_path, monkeypatch)
    gain = len(places[::2]) / len(places)
    assert "## ladder" in text and "## settings" not in text

    row = cells_of(text, "Pr@0.5, places", "CoT-SFT, GRPO minus CoT-SFT")
    means = [1.0, gain, 0.0]
    error = np.std(means, ddof=1) / math.sqrt(3)
    low, high = np.mean(means) - 4.303 * error, np.mean(means) + 4.303 * error
    assert row[0] == f"{np.mean(means):+.3f}" and row[1] == f"[{low:+.3f}, {high:+.3f}]"
    assert row[2] == f"+1.000, {gain:+.3f}, +0.000"
    assert row[4] == f"{(4.303 + 1.061) * error:.3f}"
    # Scenes alone leave the mean of three trained models almost certain.
    over_scenes = [float(v) for v in row[3].strip("[]").split(", ")]
    assert over_scenes[0] < np.mean(means) < over_scenes[1]
    assert over_scenes[1] - over_scenes[0] < 0.4 < high - low
    assert cells_of(text, "Pr@0.5, names", "CoT-SFT, GRPO minus CoT-SFT")[0] == "+0.000"
    # A box of 0.4 times the width has an IoU of 0.4.
    wrong = len(places) / 40
    assert cells_of(text, "mIoU", "CoT-SFT, GRPO minus CoT-SFT")[2].startswith(
        f"{0.6 * wrong:+.3f}, ")
    assert cells_of(text, "no box", "CoT-SFT, GRPO minus CoT-SFT")[2] == "+0.000, +0.000, +0.000"
    alone = cells_of(text, "Pr@0.5, places", "RSGround-R1 minus CoT-SFT")
    assert alone[:3] == ["+1.000", "-", "+1.000"] and alone[4] == "-"

    scores = text.split("### ladder, final")[1]
    assert cells_of(scores, "CoT-SFT", "4")[:3] == [
        "0.000 ± 0.000", "1.000 ± 0.000", f"{sum(names) / 40:.3f} ± 0.000"]
    entry, = [e for e in found if e["metric"] == "Pr@0.5, places"
              and e["contrast"] == ["cot-rft", "cot"]]
    assert entry["seeds"] == pytest.approx({"0": 1.0, "1": gain, "2": 0.0})
    assert entry["table"] == "ladder" and entry["score"] == "final"
    assert (tmp_path / "study.png").exists()


def test_errors_are_by_kind_and_by_the_number_of_things(few: dict[str, list[Record]]) -> None:
    records = few["final"]
    many = np.array([len(record.image.objects) >= 4 for record in records])
    relation = np.array([record.kind == "relation" for record in records])
    assert many.any() and not many.all() and relation.any()
    scored = {"cot": [{"Pr@0.5": ~many * 1.0}], "paper": [{"Pr@0.5": relation * 1.0}] * 2}
    text = study.part_table(records, scored)
    heads = [line.strip("| ").split(" | ") for line in text.splitlines()
             if line.startswith(("| Pr@0.5 ", "| errors "))]
    assert heads[0] == ["Pr@0.5", *sorted({record.kind for record in records})]
    assert heads[1][:3] == ["errors", "2 to 3 things", "4 to 6 things"]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "---" not in line]
    of_kinds = dict(zip(heads[0], next(row for row in rows if row[0] == "RSGround-R1")))
    assert of_kinds["relation"] == "1.000 ± 0.000" and of_kinds["category"] == "0.000 ± 0.000"
    errors = [row for row in rows if row[0] == "CoT-SFT"][1]
    assert errors[1:3] == ["0.000", "1.000"]


def test_the_medoid_is_the_sample_with_the_most_overlap(few: dict[str, list[Record]]) -> None:
    def iou(a: list[float], b: list[float]) -> float:
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
        return 0.0 if math.isnan(union) else width * height / union

    random = torch.Generator().manual_seed(3)
    corner = torch.rand(30, 8, 2, generator=random, dtype=torch.float64) * 4
    boxes = torch.cat((corner, corner + 5), -1)
    boxes[torch.rand(30, 8, generator=random) < 0.3] = NAN
    boxes[0] = NAN
    boxes[1, 1:] = NAN
    chosen = study.medoid(boxes)
    assert chosen[0].isnan().all() and torch.equal(chosen[1], boxes[1, 0])
    for samples, box in zip(boxes[1:].tolist(), chosen[1:].tolist()):
        means = {}
        for j, sample in enumerate(samples):
            if not math.isnan(sample[0]):
                others = [iou(sample, other) for k, other in enumerate(samples) if k != j]
                means[j] = sum(others) / 7
        assert box == samples[max(means, key=means.get)]


def test_eight_samples_have_pass_8_and_a_medoid(
        tmp_path: Path, few: dict[str, list[Record]], monkeypatch: pytest.MonkeyPatch) -> None:
    records = few["final"]
    texts = []
    for i, record in enumerate(records):
        # Of eight samples two are right for each fourth record, and six are one wrong box.
        right = [answer(record.box)] * (2 if i % 4 == 0 else 0)
        texts.append(right + [answer([0, 0, 1, 1])] * (8 - len(right)))
    write_texts(tmp_path / "0/cot/eval_final-8", records, texts)
    write_boxes(tmp_path / "0/cot/eval_final", records, [True] * 40)
    write_boxes(tmp_path / "0/paper/eval_final", records, [True] * 40)
    write_boxes(tmp_path / "0/paper/eval_final-blind", records, [False] * 40)
    scores = report(tmp_path, monkeypatch)[0].split("### ladder, final")[1].split("## weights")[0]
    head = cells_of(scores, "40 scenes", "seeds")
    assert head == ["Pr@0.5, places", "Pr@0.5, names", "Pr@0.5", "mIoU", "no box", "pass@1",
                    "pass@8"]
    assert cells_of(scores, "CoT-SFT", "1")[2:] == ["1.000", "1.000", "0.000", "0.062", "0.250"]
    assert cells_of(scores, "CoT-SFT, medoid of eight samples", "1")[2] == "0.000"
    assert cells_of(scores, "RSGround-R1, without the image", "1")[2:4] == ["0.000", "0.400"]
    centre = metrics.centre_box(records)
    assert cells_of(scores, "a box of the median size in the middle", "")[3] == (
        f"{centre['mIoU']:.3f}")


def test_term_and_weights_have_an_interaction(
        tmp_path: Path, few: dict[str, list[Record]]) -> None:
    records = few["final"]
    # Right answers of paper, positional, consistency, cot-rft: (0.75 - 0.5) - (0.5 - 0.1).
    pair = ("paper", "positional", "consistency", "cot-rft")
    for arm, right in zip(pair, (30, 20, 20, 4)):
        write_boxes(tmp_path / "0" / arm / "eval_final", records, [i < right for i in range(40)])
    assert pair in ablate.TABLES["weights"].contrasts
    effects = study.differences((tmp_path / "0",), pair, "final")
    assert effects["Pr@0.5"].mean == pytest.approx(-0.15)


def test_deviations_are_compared_at_equal_rewards(tmp_path: Path) -> None:
    def log(arm: str, *steps: tuple[float, float], more: str = "format") -> None:
        lines = [{"iou": mean, "iou_group_std": std, "reward": 2 * mean,
                  "reward_group_std": 2 * std, f"{more}_group_std": 0.0} for mean, std in steps]
        (tmp_path / "0" / arm).mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "0" / arm / "metrics.jsonl").write_text(text)

    log("cot-rft", (0.3, 0.9), (0.4, 0.2), (0.5, 0.1))
    log("mean", (0.4, 0.3), (0.5, 0.2), (0.6, 0.0))
    log("paper", (0.45, 0.5), (0.7, 0.6), more="positional")
    (tmp_path / "0/cot").mkdir()
    (tmp_path / "0/cot/metrics.jsonl").write_text('{"loss": 1.0}\n')
    text = study.deviation_table((tmp_path / "0",))
    # Equal rewards: 0.8 to 1 for the two with the same terms. Equal IoU: 0.45 to 0.5.
    assert cells_of(text, "CoT-SFT, GRPO") == ["0.300", "0.100"]
    assert cells_of(text, "mean weight") == ["0.500", "0.200"]
    assert cells_of(text, "RSGround-R1") == ["1.100", "0.500"]


def test_the_curve_is_the_effect_by_the_share_of_groups_that_miss(
        tmp_path: Path, few: dict[str, list[Record]], monkeypatch: pytest.MonkeyPatch) -> None:
    records = few["tiny"]
    for spread, right in ((0.5, 10), (1.5, 20)):
        for seed in "01":
            for term, exact in (("iou", 0), ("positional", right), ("hard", 4)):
                arm = tmp_path / seed / f"coarse-{spread}-{term}"
                write_boxes(arm / "eval_tiny", records, [i < exact for i in range(40)])
                steps = [{"no_overlap_groups": spread / 10}, {"no_overlap_groups": spread / 5}]
                lines = "".join(json.dumps(step) + "\n" for step in steps)
                (arm / "metrics.jsonl").write_text(lines)
    seeds = (tmp_path / "0", tmp_path / "1")
    points = study.curve_points(seeds, "mIoU")
    assert list(points) == ["positional", "hard"]
    assert [share for share, _ in points["positional"]] == pytest.approx([0.075, 0.225])
    # A box 0.4 times as wide becomes exact.
    gains = [effect.mean for _, effect in points["positional"]]
    assert gains == pytest.approx([0.6 * 10 / 40, 0.6 * 20 / 40])
    text, found = report(tmp_path, monkeypatch)
    assert cells_of(text, "+ positional minus IoU", "0.225", "2", "+0.300") == ["[+0.300, +0.300]"]
    assert {entry["metric"] for entry in found} == {"mIoU", "touched"}
    assert (tmp_path / "study.png").exists()


def test_mistakes_about_a_study_are_one_line(
        tmp_path: Path, few: dict[str, list[Record]], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(SystemExit) as leaving:
            report(folder, monkeypatch)
        message = capsys.readouterr().err
        assert leaving.value.code == 2 and message.count("\n") == 1, message
        return message

    assert "run ablate.sh first" in refusal(tmp_path / "nowhere")
    records = few["final"]
    write_boxes(tmp_path / "a/0/cot/eval_final", records, [True] * 40)
    write_boxes(tmp_path / "a/0/boxes/eval_final", records[:30], [True] * 30)
    assert "scores of 30 and 40 scenes cannot be compared" in refusal(tmp_path / "a")
    write_boxes(tmp_path / "b/0/cot/eval_final", records, [True] * 40)
    (tmp_path / "b/0/cot/eval_final/predictions_x.jsonl").unlink()
    assert "0 files predictions_*.jsonl" in refusal(tmp_path / "b")


def test_contrasts_are_of_their_tables_arms() -> None:
    for table in ablate.TABLES.values():
        assert set(table.arms) <= set(ablate.ARMS) and set(table.scores) <= set(ablate.SCORES)
        for contrast in table.contrasts:
            assert len(contrast) in (2, 4) and set(contrast) <= {"own", *table.arms}
        for arm, score in table.more:
            assert arm in table.arms and score in ablate.SCORES


def test_the_papers_table_has_a_row_a_stage_and_columns_a_data_set(tmp_path: Path) -> None:
    for i, name in enumerate(("dior", "geopix")):
        rows = []
        for j, stage in enumerate(("base", "sft", "rft")):
            scores = {metric: (i + j) / 10 for metric in paper.METRICS}
            ci = {metric: [0.0, 1.0] for metric in paper.METRICS}
            rows.append({"stage": stage, "data": name, "split": "test", "n": 7, "images": 70,
                         **scores, "ci": ci})
        (tmp_path / f"eval_{name}").mkdir()
        (tmp_path / f"eval_{name}" / "eval.json").write_text(json.dumps({"rows": rows}))
    lines = paper.table(paper.read_rows(tmp_path)).splitlines()
    assert lines[0].startswith("| stage | dior test (7): Pr@0.5 |")
    assert len(lines) == 5 and lines[4].startswith("| rft | 0.200 [0.000, 1.000] |")
    assert lines[4].endswith("| 0.300 [0.000, 1.000] |")


# ---------------------------------------------------------------- ablate.py

def run_table(
        monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str, stop: int = 1,
        **settings: str) -> list[list[str]]:
    """ablate.main with scripts that train nothing -> their commands, as lists of words.

    A stage leaves the run.json of all its steps, or of one in `stop`.
    """
    commands = []

    def command(*words: object) -> None:
        words = [str(word) for word in words]
        commands.append(words)
        if words[0] == "study/study.py":
            return
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        if words[0] != "eval.py":
            (out / "step_1").mkdir(exist_ok=True)
            steps = int(words[words.index("--steps") + 1])
            run = {"step": steps // stop, "flags": {"steps": steps}}
            (out / "step_1" / "run.json").write_text(json.dumps(run))
            if not (out / "latest").exists():
                (out / "latest").symlink_to("step_1")

    for name in ("ARMS", "BASES", "SEEDS", "SFT", "RFT", "TEST", "OWN"):
        monkeypatch.setenv(name, settings.get(name, ""))
    monkeypatch.setenv("STUDY", str(folder / "a study"))
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["ablate.py", *names])
    monkeypatch.setattr(ablate, "command", command)
    monkeypatch.setattr(ablate, "write_coarse", lambda *_: None)
    monkeypatch.setattr(ablate.signal, "signal", lambda *_: None)
    try:
        ablate.main()
    except SystemExit as leaving:
        # Stopped stages alone: mistakes are tested through refusal().
        assert leaving.code == 130
    return commands


def trained(commands: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """SEED/ARM -> the command that trained it. Each arm of a seed is trained once."""
    found = {}
    for words in commands:
        if words[0] in ("sft.py", "rft.py"):
            out = Path(words[words.index("--out") + 1])
            key = f"{out.parent.name}/{out.name}"
            assert key not in found
            found[key] = words
    return found


def parsed(words: Sequence[str]) -> dict[str, object]:
    """The flags of a stage's command."""
    flags = {"sft.py": sft.flags, "rft.py": rft.flags}[words[0]]()
    values = vars(flags.parse_args(words[1:]))
    # Given and default values may be a list and a tuple.
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def test_every_arm_is_trained_as_its_name_says(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tables in one folder: what they share is trained once."""
    commands = []
    for name, table in ablate.TABLES.items():
        seeds = "0 3" if table.seeds > 3 else "0"
        commands += run_table(monkeypatch, tmp_path, name, SEEDS=seeds)
    commands += run_table(monkeypatch, tmp_path, "ladder", ARMS="own", SEEDS="3",
                          OWN="--alpha 10 --lr 1")
    of_arms = trained(commands)
    arms = [name for name, arm in ablate.ARMS.items() if arm.command]
    three = [name for name in arms
             if ablate.ARMS[name].seeds > 3 and not name.startswith("first")]
    assert set(of_arms) == {f"0/{a}" for a in arms if a != "own"} | {f"3/{a}" for a in three}

    out = tmp_path / "a study"
    flags = {name: parsed(words) for name, words in of_arms.items()}
    for name, own in flags.items():
        seed, arm = name.split("/")
        start = ablate.ARMS[arm].start
        assert own["init"] == ("toy/base" if start == "base" else str(out / seed / start)), name
        assert own["seed"] == int(seed) and own["max_new_tokens"] == 192 and own["freeze_vision"]
    for seed, split in (("0", "sft"), ("3", "sft-3")):
        for arm in ("cot", "boxes"):
            own = flags[f"{seed}/{arm}"]
            assert own["split"] == split and own["data"] == "synth" and own["steps"] == 1000
            assert own["answer_only"] == (arm == "boxes") and own["lr"] == 1.5e-3

    def differing(arm: str, than: str) -> dict[str, object]:
        """The flags of an arm that are not those of another, folders aside."""
        mine, other = flags[f"0/{arm}"], flags[f"0/{than}"]
        return {k: v for k, v in mine.items() if v != other[k] and k not in ("init", "out")}

    rewards = flags["0/cot-rft"]
    assert rewards["reward"] == {"iou": 1, "format": 1} and rewards["weighting"] == "off"
    assert rewards["steps"] == 40 and rewards["prompts"] == 32 and rewards["data"] == "synth"
    for arm in ("direct", "boxes-rft", "first"):
        assert not differing(arm, "cot-rft")
    paper = {"iou": 1, "positional": 0.1, "format": 1}
    assert differing("paper", "cot-rft") == {"reward": paper, "weighting": "consistency"}
    assert differing("positional", "cot-rft") == {"reward": paper}
    for weighting in ("mean", "variance", "consistency", "shuffled"):
        assert differing(weighting, "cot-rft") == {"weighting": weighting}
    for weighting in ("mean", "variance", "shuffled"):
        assert differing(f"positional-{weighting}", "positional") == {"weighting": weighting}
    assert differing("weight-hard", "paper") == {"weight_of": "iou_hard"}
    assert differing("hard", "weight-hard") == {
        "reward": {"iou_hard": 1, "positional": 0.1, "format": 1}}

    lr = rewards["lr"]
    changes = {
        "std": {"no_std": False}, "lr-half": {"lr": lr / 2}, "lr-2": {"lr": 2 * lr},
        "lr-4": {"lr": 4 * lr}, "longer": {"steps": 80}, "g16": {"group": 16, "prompts": 16},
        "g4": {"group": 4, "prompts": 64}, "kl": {"beta": 0.04},
        "warmup": {"warmup": 10}}
    for name, change in changes.items():
        assert differing(f"first-{name}", "first") == pytest.approx(change), name
    assert set(ablate.SETTINGS) == {"first", *(f"first-{c}" for c in changes)}

    for spread in (0.5, 1, 1.5, 2, 3):
        start = flags[f"0/coarse-{spread}"]
        assert start["steps"] == 100 and start["data"] == "jsonl" and not start["answer_only"]
        assert start["root"] == str(out / "0" / f"coarse-{spread}-boxes")
        arm = flags[f"0/coarse-{spread}-iou"]
        assert arm["data"] == "synth-tiny" and arm["steps"] == 20 and arm["lr"] == 3e-4
        assert not arm["no_std"] and arm["weighting"] == "off"
        assert arm["reward"] == {"iou": 1, "format": 1}
        for term, weights in (
                ("giou", {"iou": 1, "giou": 0.1}), ("diou", {"iou": 1, "diou": 0.1}),
                ("center", {"iou": 1, "center": 0.1}), ("hard", {"iou_hard": 1}),
                ("positional", {"iou": 1, "positional": 0.1}),
                ("hard-positional", {"iou_hard": 1, "positional": 0.1})):
            assert differing(f"coarse-{spread}-{term}", f"coarse-{spread}-iou") == {
                "reward": weights | {"format": 1}}
    own = flags["3/own"]
    assert own["alpha"] == 10 and own["lr"] == 1 and own["reward"] == rewards["reward"]


def test_a_table_scores_its_arms_on_its_splits(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, table in ablate.TABLES.items():
        scored = {}    # (arm, folder) -> flags
        for words in run_table(monkeypatch, tmp_path / name, name, SEEDS="1", TEST="600"):
            if words[0] == "eval.py":
                out = Path(words[words.index("--out") + 1])
                assert (out.parent.name, out.name) not in scored
                scored[out.parent.name, out.name] = evaluation.flags().parse_args(words[1:])
                if out.parent.name == "base":
                    assert words[1] == "toy/base"
                else:
                    assert words[1] == str(out.parent)
        expected = {(arm, f"eval_{score}") for arm in table.arms for score in table.scores}
        assert set(scored) == expected | {(arm, f"eval_{score}") for arm, score in table.more}
        for (_, folder), args in scored.items():
            data = {"small": "synth-small", "tiny": "synth-tiny"}.get(folder[5:], "synth")
            assert args.data == data and args.max_new_tokens == 192
            assert args.split == {"val": "val", "novel": "novel"}.get(folder[5:8], args.split)
            if folder[5:10] in ("final", "small", "tiny"):
                assert args.split == "final"
            assert args.limit == (500 if folder[5:8] in ("val", "tin") else 600)
            eight = folder.endswith("-8")
            assert args.samples == (8 if eight else 1) and args.temperature == [float(eight)]
            assert args.blind == folder.endswith("blind")
    assert ("cot", "eval_final-8") not in scored    # of the last table, weights


def test_seeds_have_bases_and_arms_of_their_own(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    commands = run_table(monkeypatch, tmp_path, "ladder", BASES=f"3={tiny_checkpoint}")
    inits = {name: parsed(words)["init"] for name, words in trained(commands).items()}
    assert {name.split("/")[0] for name in inits} == set("01234")
    assert inits["3/cot"] == inits["3/direct"] == str(tiny_checkpoint)
    assert inits["2/cot"] == inits["4/boxes"] == "toy/base"
    # Seed by seed, so a study that is stopped has whole seeds.
    seeds = [name.split("/")[0] for name in trained(commands)]
    assert seeds == sorted(seeds)

    commands = run_table(monkeypatch, tmp_path / "curve", "curve")
    spreads = {}
    for name in trained(commands):
        seed, arm = name.split("/")
        spreads.setdefault(seed, set()).add(arm.split("-")[1])
    assert set(spreads) == set("0123456789")
    for seed, found in spreads.items():
        assert found == ({"0.5", "1", "1.5", "2", "3"} if seed in "012" else {"1.5", "2"})


@pytest.mark.parametrize("names, settings, message", [
    (("ladder",), {"ARMS": "cot riou"}, "ARMS: there is no riou; use some of base, direct, boxes"),
    (("ladder",), {"ARMS": "own"}, "the arm own needs OWN: flags of rft.py"),
    (("ladder",), {"SEEDS": "0 10"}, "SEEDS: 10 is not a seed of this table, which has 0 to 4"),
    (("ladder",), {"BASES": "3"}, "BASES: 3 is not SEED=FOLDER with a model in the folder"),
    (("ladder",), {"SFT": "few"}, "SFT=few is not a whole number"),
    (("rewards",), {}, "name one table: ladder, settings, curve, weights"),
    (("ladder", "curve"), {}, "name one table"),
    ((), {}, "name one table"),
])
def test_mistakes_are_refused_before_training(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        names: tuple[str, ...], settings: dict[str, str], message: str) -> None:
    with pytest.raises(AssertionError):    # exit status 2, not 130
        run_table(monkeypatch, tmp_path, *names, **settings)
    error = capsys.readouterr().err
    assert error.startswith(f"ablate.py: {message}") and error.count("\n") == 1
    assert not (tmp_path / "a study").exists()


def test_an_arm_that_was_stopped_resumes_and_finished_work_is_not_repeated(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"SEEDS": "0", "ARMS": "cot-rft", "RFT": "4", "TEST": "9"}
    stopped = run_table(monkeypatch, tmp_path, "ladder", stop=2, **settings)
    # A stage that is stopped exits with status 0, but is not finished.
    assert "the same command resumes" in capsys.readouterr().err and len(stopped) == 1
    assert not (tmp_path / "a study/0/cot/done").exists()
    whole = run_table(monkeypatch, tmp_path, "ladder", **settings)
    assert whole[0][0] == "sft.py" and whole[0][-1] == "--resume"
    assert not any("--resume" in words for words in whole[1:])
    assert [words[0] for words in whole] == ["sft.py", "rft.py", *["eval.py"] * 3, "study/study.py"]
    again = run_table(monkeypatch, tmp_path, "ladder", **settings)
    assert [words[0] for words in again] == ["study/study.py"]
    # More scenes are scored without training.
    more = run_table(monkeypatch, tmp_path, "ladder", **{**settings, "TEST": "10"})
    assert [words[0] for words in more] == [*["eval.py"] * 3, "study/study.py"]
    assert all(words[words.index("--limit") + 1] == "10" for words in more[:-1])


@pytest.mark.parametrize("changed", [{"RFT": "5"}, {"SFT": "9"}])
def test_a_name_means_one_setting_in_a_study(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        changed: dict[str, str]) -> None:
    """An arm's folder remembers its own settings, and those of what it started from."""
    settings = {"SEEDS": "0", "ARMS": "cot-rft", "RFT": "4", "SFT": "8"}
    run_table(monkeypatch, tmp_path, "ladder", **settings)
    with pytest.raises(AssertionError):    # exit status 2, not 130
        run_table(monkeypatch, tmp_path, "ladder", **settings | changed)
    assert "was trained with other settings; move it away" in capsys.readouterr().err


def test_ablate_sh_runs_ablate_py() -> None:
    done = subprocess.run(
        ["bash", "study/ablate.sh", "rewards"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PY": sys.executable})
    assert done.returncode == 2 and done.stderr.startswith("ablate.py: name one table")


@pytest.mark.parametrize("spread", [0.5, 3])
def test_boxes_of_the_coarse_sft_are_moved(spread: float) -> None:
    rng = random.Random(0)
    shifts = []
    for _ in range(2000):
        box = ablate.moved((400.0, 300.0, 410.0, 320.0), (1000, 1000), spread, rng)
        x1, y1, x2, y2 = box
        assert x2 - x1 == pytest.approx(10, abs=0.02) and y2 - y1 == pytest.approx(20, abs=0.02)
        shifts.append(((x1 - 400) / 10, (y1 - 300) / 20))
    assert np.mean(shifts, 0) == pytest.approx([0, 0], abs=0.1 * spread)
    assert np.std(shifts, 0) == pytest.approx([spread] * 2, rel=0.05)
    for _ in range(100):
        x1, y1, x2, y2 = ablate.moved((0.0, 40.0, 90.0, 112.0), (112, 112), spread, rng)
        assert 0 <= x1 < x2 <= 112 and 0 <= y1 < y2 <= 112


def test_coarse_records_are_a_tenth_of_the_seeds_own(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(scenes.SPLITS["sft-3"], scenes=100)
    monkeypatch.setitem(scenes.WORLDS["synth"], "sft-3", few)
    ablate.write_coarse(tmp_path / "coarse", 1.5, "3")
    written = load("jsonl", tmp_path / "coarse", "sft")
    true = load("synth", None, "sft-3")
    assert len(written) == len(true) // 10 > 5 and not written.refused
    for record, original in zip(written, true):
        assert record.text == original.text and record.box != original.box
    picture = np.asarray(open_image(written[0]))
    assert np.array_equal(picture, np.asarray(open_image(true[0])))


# ---------------------------------------------------------------- the figure

def test_the_figure_is_gray_and_shows_every_group(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bars = [("a rather long name of an arm minus another arm, final",
             study.Effect({"0": 0.0, "1": 0.01}, (-0.01, 0.02))),
            ("short", study.Effect({"0": 0.07}, (0.05, 0.09)))]
    curve = {"positional": [(0.1, bars[0][1]), (0.3, bars[1][1])], "giou": [(0.1, bars[0][1])]}
    heights = []
    for groups, points in (([("ladder", bars)], {}), ([("ladder", bars), ("weights", bars)], {}),
                           ([("ladder", bars)], curve), ([], curve)):
        study.draw(groups, points, tmp_path / "1.png")
        pixels = np.asarray(Image.open(tmp_path / "1.png").convert("RGB")).astype(int)
        assert np.ptp(pixels, 2).max() == 0 and pixels.min() == 0
        heights.append(len(pixels))
    assert heights[1] > heights[0] + 80 and heights[2] > heights[1] > heights[0]
    assert heights[3] < heights[2]


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
