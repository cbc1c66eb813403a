"""runtime.py: flags, schedule, data order and log by hand, checkpoints as files. (Processes and resume: test_sft.py, test_rft.py.)"""
import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import data
import runtime
from model import CheckpointError, QwenVL


def refused(capsys, call, *args):
    """The one line that a user's mistake is answered with."""
    with pytest.raises(SystemExit) as leaving:
        call(*args)
    lines = capsys.readouterr().err.strip().splitlines()
    assert leaving.value.code == 2 and len(lines) == 1
    return lines[0]


def test_numbers_that_are_out_of_range_are_no_flags():
    for kind, good, bad in [(runtime.positive, ["1", "7"], ["0", "-1", "1.5", "nan", "many"]),
                            (runtime.natural, ["0", "7"], ["-1", "inf", ""]),
                            (runtime.seed, ["0", "2147483647"], ["-1", "2147483648", "9999999999999999"]),
                            (runtime.finite, ["-1", "0", "1e-6"], ["nan", "inf", "-inf", "x"]),
                            (runtime.above_zero, ["1e-6", "2"], ["0", "-1", "nan", "inf"]),
                            (runtime.not_negative, ["0", "0.2"], ["-0.1", "nan", "inf"])]:
        assert [kind(text) for text in good] == [float(text) for text in good]
        for text in bad:
            with pytest.raises(runtime.argparse.ArgumentTypeError, match=f"^{text} is not a "):
                kind(text)


def test_learning_rate_by_hand():
    # 100 steps: warm-up over 3, then a cosine from 1 to 0.1
    assert [round(runtime.lr_at(s, 100, 1.0), 4) for s in (0, 1, 2, 3)] == [0.3333, 0.6667, 1.0, 1.0]
    assert math.isclose(runtime.lr_at(3 + 97 / 2, 100, 1.0), 0.55) and math.isclose(runtime.lr_at(99, 100, 1.0), 0.1, abs_tol=1e-3)
    assert runtime.lr_at(0, 1, 1.0) == 1.0


def test_every_epoch_has_each_record_once_in_an_order_of_its_own():
    records = list(range(10))
    steps = [runtime.batch(records, s, 4, seed=0) for s in range(5)]     # two epochs
    flat = sum(steps, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == records and flat[:10] != flat[10:]
    assert steps[3] == runtime.batch(records, 3, 4, seed=0) != runtime.batch(records, 3, 4, seed=1)


def test_a_log_is_cut_behind_the_step_that_a_run_goes_on_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        runtime.log(path, {"step": step})
    for broken in ('{"step": 4, "lo', '{"step": 2, "each": {"iou": 0}', "\0\0"):                     # the crash came while writing
        path.write_text(path.read_text() + broken)
        runtime.cut_log(path, 2)
        assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')                 # no crash leaves this
    with pytest.raises(data.DataError, match="metrics.jsonl, line 2"):
        runtime.cut_log(path, 2)


def test_clipping_and_a_gradient_that_is_not_finite():
    layer = torch.nn.Linear(2, 1, bias=False)
    opt = torch.optim.SGD(layer.parameters(), lr=0.0)
    start = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert runtime.update(layer, opt, lr=1.0) == 5.0
    assert torch.allclose(start - layer.weight, torch.tensor([[0.6, 0.8]]), atol=1e-5) and layer.weight.grad is None
    stood = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[torch.nan, 1.0]])
    assert math.isnan(runtime.update(layer, opt, lr=1.0)) and torch.equal(layer.weight, stood)


@pytest.fixture
def saved(tiny_checkpoint, tmp_path):
    model, processor = QwenVL.from_pretrained(tiny_checkpoint, dtype=None), data.Processor.from_pretrained(tiny_checkpoint)
    opt = runtime.optimizer(model, 1e-3)
    sum(p.square().sum() for p in model.parameters()).backward()
    runtime.update(model, opt, 1e-3)
    for step in (1, 2):
        runtime.save(tmp_path / "out", step, model, opt, processor, {"stage": "sft"})
    return tmp_path / "out", model, opt


def test_a_step_holds_all_that_is_needed_and_latest_names_the_newest(saved, tiny_checkpoint):
    out, model, opt = saved
    assert (out / "latest").resolve().name == "step_000002" and not list(out.glob(".*"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "run.json", "state"} <= {
        p.name for p in (out / "latest").iterdir()}
    other = QwenVL.from_pretrained(out, dtype=None)                      # a stage's folder, too
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters()))

    fresh = QwenVL.from_pretrained(tiny_checkpoint, dtype=None)
    fresh_opt = runtime.optimizer(fresh, 1e-3)
    assert runtime.restore(out, fresh, fresh_opt) == 2
    for a, b in zip(fresh.parameters(), model.parameters()):
        assert torch.equal(a, b) and all(torch.equal(fresh_opt.state[a][k], opt.state[b][k]) for k in ("step", "exp_avg", "exp_avg_sq"))


def test_a_state_that_is_not_whole_is_refused(saved):
    out, model, opt = saved
    state = out / "latest" / "state"
    file = next(state.iterdir())
    file.rename(state / "rank_00000_of_00002.safetensors")
    with pytest.raises(CheckpointError, match="not whole"):
        runtime.restore(out, model, opt)


def test_a_state_that_is_cut_off_is_refused_by_name(saved):
    out, model, opt = saved
    file = next((out / "latest" / "state").iterdir())
    for kept in (0, 100, file.stat().st_size - 1):
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(CheckpointError, match=r"rank_00000_of_00001.safetensors: .*latest at an earlier step"):
            runtime.restore(out, model, opt)


def test_an_output_that_cant_be_written_to_is_refused_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in [tmp_path / "file", tmp_path / "file" / "in"] + ([runtime.Path("/proc/here")] if sys.platform == "linux" else []):
        for words in (refused(capsys, runtime.check_output, folder, False), refused(capsys, runtime.writable, folder)):
            assert f"nothing can be written to {folder} (" in words and "--out" in words
    assert runtime.writable(tmp_path / "a" / "b") == tmp_path / "a" / "b" and not list((tmp_path / "a" / "b").iterdir())
    runtime.check_output(tmp_path / "a" / "b", False)                    # an empty folder is a new one


def parsed(monkeypatch, *flags):
    parser = runtime.FlagParser("")
    runtime.add_common_flags(parser, "sft", "toy/base", 1000)
    parser.add_argument("--val", type=runtime.natural, default=0)
    parser.add_argument("--lr", type=runtime.above_zero, default=1e-5)
    parser.add_argument("--weights", type=float, nargs=3, default=(1.0, 0.5, 0.5))
    monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, flags)])
    return runtime.parse(parser, "sft")


@pytest.fixture
def run_json(saved, monkeypatch):
    """run.json of a run with some flags, beside the checkpoint that it belongs to."""
    out, (first, last) = saved[0], (data.Records([], {}), data.Records([data.Record("1", "", "x", (0, 0, 1, 1), "", (9, 9))], {}))
    args = parsed(monkeypatch, "--out", out, "--data", "dior", "--lr", 1e-4, "--init", "toy/base", "--steps", 4, "--freeze-vision")
    file = out / "latest" / "run.json"
    file.write_text(json.dumps({**runtime.run_description(args, "sft", first), "step": 2}))
    return out, file, last


def test_a_resume_takes_up_the_flags_of_its_run(run_json, monkeypatch, capsys):
    out, file, _ = run_json
    args = parsed(monkeypatch, "--out", out, "--resume", "--steps", 6, "--init", "./toy/../toy/base/", "--weights", 1, 0.5, 0.5)
    assert (args.data, args.lr, args.freeze_vision, args.steps, args.resume, args.out) == ("dior", 1e-4, True, 6, True, str(out))
    moved = out.rename(out.parent / "moved")
    assert parsed(monkeypatch, "--out", moved, "--resume", "--workers", 1, "--root", "elsewhere").out == str(moved)
    for flags, words in [(("--lr", 1e-3), f"--lr 0.001, but the run in {moved} has 0.0001"), (("--data", "synth"), "--data synth"),
                         (("--init", "other"), "--init other"), (("--seed", 1), "--seed 1"), (("--max-pixels", 9), "--max-pixels 9")]:
        assert words in refused(capsys, parsed, monkeypatch, "--out", moved, "--resume", *flags)


def test_a_resume_goes_on_with_no_other_stage_data_or_folder(run_json, monkeypatch, capsys):
    out, file, other = run_json
    monkeypatch.setattr(runtime, "load", lambda *a: other)
    args = parsed(monkeypatch, "--out", out, "--resume")
    assert "the records of dior sft are not those of the run" in refused(capsys, runtime.load_records, args, "sft")
    run = json.loads(file.read_text())
    file.write_text(json.dumps({**run, "stage": "rft"}))
    assert "holds a run of rft.py" in refused(capsys, parsed, monkeypatch, "--out", out, "--resume")
    for broken in ("[]", "{}"):
        file.write_text(broken)
        assert "run.json does not say how the run began" in refused(capsys, parsed, monkeypatch, "--out", out, "--resume")
    file.unlink()
    assert "run.json does not say how the run began" in refused(capsys, parsed, monkeypatch, "--out", out, "--resume")
    step = (out / "latest").resolve()
    (out / "latest").unlink()
    shutil.copytree(step, out / "latest")
    assert f"&& ln -s step_000002 {out / 'latest'}" in refused(capsys, parsed, monkeypatch, "--out", out, "--resume")
    shutil.rmtree(out / "latest")
    assert "there is no checkpoint in" in refused(capsys, parsed, monkeypatch, "--out", out, "--resume")


def test_a_stage_needs_a_record_and_says_what_was_refused(tmp_path, capsys):
    def args(name, root=None):
        return SimpleNamespace(data=name, root=root, val=2, resume=False)
    with pytest.raises(data.DataError, match=r"no record of synth:0.00001 sft to train on; none was refused; is its share too small\?"):
        runtime.load_records(args("synth:0.00001"), "sft")
    line = {"image": "none.png", "text": "x", "box": [0, 0, 1, 1]}
    (tmp_path / "train.jsonl").write_text(json.dumps({**line, "id": "1"}))
    (tmp_path / "val.jsonl").write_text(json.dumps({**line, "id": "2"}))
    with pytest.raises(data.DataError, match=r"to train on; 1 of 1 records are refused \(missing image: 1\); python data.py jsonl"):
        runtime.load_records(args("jsonl", tmp_path), "train")
    data.Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    (tmp_path / "train.jsonl").write_text(json.dumps({**line, "id": "1", "image": "one.png"}))
    capsys.readouterr()
    records, val = runtime.load_records(args("jsonl", tmp_path), "train")
    assert len(records) == 1 and not val
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1 records of train" and said[1].startswith("0 records of val; 1 of 1 records are refused (missing image: 1)")


def test_an_interrupted_save_leaves_the_last_checkpoint_standing(saved, monkeypatch):
    out, model, opt = saved
    processor = data.Processor.from_pretrained(out)
    monkeypatch.setattr(type(model), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        runtime.save(out, 3, model, opt, processor, {})
    monkeypatch.undo()
    assert (out / "latest").resolve().name == "step_000002" and not (out / "step_000003").exists()
    runtime.save(out, 3, model, opt, processor, {})                      # what is left over is in nobody's way
    assert (out / "latest").resolve().name == "step_000003"


def test_weights_are_saved_in_the_checkpoints_own_dtype_and_masters_in_float32(tiny_checkpoint, tmp_path):
    from safetensors.torch import load_file
    QwenVL.from_pretrained(tiny_checkpoint, dtype=None)
    half = QwenVL.from_pretrained(tiny_checkpoint, dtype=None)
    half.stored_dtype = torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (tmp_path / "half" / name).write_bytes((tiny_checkpoint / name).read_bytes())
    model = runtime.prepare(QwenVL.from_pretrained(tmp_path / "half", dtype=None), torch.device("cpu"))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    runtime.save(tmp_path / "out", 1, model, runtime.optimizer(model, 1e-3), data.Processor.from_pretrained(tmp_path / "half"), {})
    assert {t.dtype for t in load_file(tmp_path / "out" / "latest" / "model.safetensors").values()} == {torch.bfloat16}
    state = next((tmp_path / "out" / "latest" / "state").iterdir())
    assert {t.dtype for t in load_file(state).values()} == {torch.float32}


def test_micro_batches_keep_within_the_budget_and_leave_nothing_out():
    tokens = [5, 1, 9, 2, 2, 30, 4, 4]
    for budget in (1, 9, 12, 40, 100):
        cuts = runtime.micro_batches(tokens, budget)
        assert [i for s in cuts for i in range(s.start, s.stop)] == list(range(len(tokens)))
        assert all(sum(tokens[s]) <= budget or s.stop - s.start == 1 for s in cuts)
    assert len(runtime.micro_batches(tokens, 1)) == 8 and len(runtime.micro_batches(tokens, 100)) == 1


def test_inputs_prepared_ahead_are_those_prepared_here_and_a_bad_image_is_said_in_one_line():
    def make(step):
        if step == 7:
            raise data.DataError("scene.jpg: unreadable")
        return torch.full((3,), step), {"step": step}
    for workers in (0, 2):
        got = list(runtime.prefetch(make, range(2, 7), workers))
        assert [(x.tolist(), d["step"]) for x, d in got] == [([k] * 3, k) for k in range(2, 7)]
        with pytest.raises(data.DataError, match=r"^scene\.jpg: unreadable$"):
            list(runtime.prefetch(make, range(5, 9), workers))
