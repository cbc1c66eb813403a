"""model.py beside transformers' Qwen2.5-VL (random weights), beside dense attention, and by hand."""
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import model as ours
from model import CheckpointError, Plan, QwenVL, attention, positions
from processor import Processor

IMAGE, START, END = 290, 292, 293


def random_checkpoint(path, tied=False, dtype=torch.float32, **text):
    """A small random Qwen2.5-VL as transformers writes it; weights large enough that masks and positions matter."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": 17, **text}
    vision = {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": text["hidden_size"],
              "fullatt_block_indexes": [1, 3], "window_size": 112}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=291,
                                           vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=tied)
    torch.manual_seed(0)
    theirs = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            spread = {"bias": 0.3, "embed_tokens.weight": 1.0}.get(name.split(".", 3)[-1], 1.5 * p.shape[-1] ** -0.5)
            p.copy_(torch.randn(p.shape) * (0.3 if p.ndim == 1 else spread) + ("norm" in name or "ln_q" in name))
    theirs.to(dtype).save_pretrained(path)
    return theirs


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    theirs = random_checkpoint(path, tied=request.param)
    return QwenVL.from_pretrained(path, dtype=torch.float32), theirs


def prompt(grids, text, seed=0):
    """ids of one sequence with these images (t, h, w in patches), random patches: like Processor's, without a tokenizer."""
    ids = [3, 4]
    for t, h, w in grids:
        ids += [START, *[IMAGE] * (t * h * w // 4), END, 9]
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), 1176, generator=torch.Generator().manual_seed(seed))
    grids = torch.tensor(grids, dtype=torch.long).view(-1, 3)
    return SimpleNamespace(input_ids=torch.tensor(ids + text), pixel_values=pixels, image_grid_thw=grids)


# 308 x 476 px: windows cut at both edges; 112 px: exactly one window; 140 x 112; a text alone
PROMPTS = [prompt([(1, 22, 34)], [5, 6, 7, 8], 0), prompt([(1, 8, 8), (1, 10, 8)], list(range(20, 45)), 1), prompt([], [30, 31], 2)]


def padded(prompts, side):
    longest = max(len(p.input_ids) for p in prompts)
    ids, mask = (torch.zeros(len(prompts), longest, dtype=torch.long) for _ in range(2))
    for i, p in enumerate(prompts):
        where = slice(longest - len(p.input_ids), None) if side == "left" else slice(len(p.input_ids))
        ids[i, where], mask[i, where] = p.input_ids, 1
    return ids, mask, torch.cat([p.pixel_values for p in prompts]), torch.cat([p.image_grid_thw for p in prompts])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_transformers(pair, side):
    model, theirs = pair
    ids, mask, pixels, grids = padded(PROMPTS, side)
    with torch.no_grad():
        got = model(ids, mask, pixels, grids)
        want = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels, image_grid_thw=grids,
                      mm_token_type_ids=(ids == IMAGE).int()).logits
    assert got.shape == want.shape and relative(got[mask.bool()], want[mask.bool()]) < 1e-5
    assert (got[~mask.bool()] == 0).all()


def test_a_batch_of_unequal_prompts_equals_each_alone(pair):
    model, _ = pair
    ids, mask, pixels, grids = padded(PROMPTS, "left")
    with torch.no_grad():
        together = model(ids, mask, pixels, grids)
        for row, keep, p in zip(together, mask.bool(), PROMPTS):
            alone = model(p.input_ids[None], None, p.pixel_values, p.image_grid_thw)[0]
            assert relative(row[keep], alone) < 1e-5


def test_vision_tower_sees_windows_and_cut_windows(pair):
    """Tokens of another window do not reach a block that attends within windows: without full-attention blocks a change stays local."""
    model, _ = pair
    config = model.visual.config
    tower = ours.VisionTower(type(config)(**{**config.__dict__, "full_blocks": ()}))
    tower.load_state_dict(model.visual.state_dict())
    pixels = PROMPTS[0].pixel_values.clone()
    with torch.no_grad():
        before = tower(pixels, [(1, 22, 34)])
        pixels[:4] += 1.0                                                # the first token, row 0, column 0: window of tokens 0..3 x 0..3
        changed = ((tower(pixels, [(1, 22, 34)]) - before).abs().amax(1) > 1e-6).view(11, 17)
    assert changed[:4, :4].all() and changed.sum() == 16


def test_positions_by_hand():
    # two text tokens, an image of 2 x 3 tokens, one text token: the image starts at 2, the text goes on at 2 + max(2, 3) = 5
    got = positions(torch.tensor([7, 7, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 7]), [(1, 4, 6)], IMAGE, 2)
    assert got.tolist() == [[0, 1, 2, 2, 2, 2, 2, 2, 5], [0, 1, 2, 2, 2, 3, 3, 3, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]]
    with pytest.raises(ValueError, match="do not match"):
        positions(torch.tensor([IMAGE, 7]), [(1, 4, 6)], IMAGE, 2)


# ---------------------------------------------------------------------------------------------------------------- attention

def dense(q, k, v, seen):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def seen_in_groups(prompts, completions):
    """Who sees whom, written out token by token: prompts first, then each prompt's completions."""
    owner = [("prompt", q, i) for q, n in enumerate(prompts) for i in range(n)]
    owner += [((q, g), q, i) for q, group in enumerate(completions) for g, n in enumerate(group) for i in range(n)]
    return torch.tensor([[(a[0] == b[0] and a[1] == b[1] and b[2] <= a[2]) or (a[0] != "prompt" and b[0] == "prompt" and a[1] == b[1])
                          for b in owner] for a in owner])


@pytest.mark.parametrize("spelled_out", [False, True], ids=["kernel", "plain"])
def test_attention_over_groups_equals_dense_attention(spelled_out, monkeypatch):
    if spelled_out:
        monkeypatch.setattr(ours, "flash", ours.plain)
        monkeypatch.setattr(ours, "flash_backward", ours.plain_backward)
    prompts, completions = [5, 9, 3], [[4, 1, 4], [0, 2], [0, 0]]
    seen = seen_in_groups(prompts, completions)
    torch.manual_seed(1)
    q, k, v, grad = (torch.randn(len(seen), h, 8) * 2 for h in (4, 2, 2, 4))
    plan = Plan(prompts + sum(completions, []), prefix=[(n, sum(c)) for n, c in zip(prompts, completions)])
    results = []
    for f in (lambda q, k, v: attention(q, k, v, plan), lambda q, k, v: dense(q, k, v, seen)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = f(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for got, want in zip(*results):
        assert relative(got, want) < 1e-5


def test_attention_within_windows_is_not_causal():
    lengths = [4, 4, 2, 4, 1]
    owner = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    q, k, v = (torch.randn(15, 2, 8) for _ in range(3))
    assert torch.allclose(attention(q, k, v, Plan(lengths, causal=False)), dense(q, k, v, owner[:, None] == owner), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- scoring

COMPLETIONS = [[torch.tensor(c) for c in group] for group in ([[1, 2, 17], [9, 8, 7, 6, 5], [17]], [[4, 17], [3, 3, 3]], [[2], [40, 41]])]


def scored_apart(model, prompts, completions, temperature):
    """The plain slow path: every completion behind a copy of its prompt, one forward pass each."""
    out = []
    for p, group in zip(prompts, completions):
        for c in group:
            logits = model(torch.cat((p.input_ids, c))[None], None, p.pixel_values, p.image_grid_thw)[0, len(p.input_ids) - 1:-1]
            logits = logits / temperature
            logits[:, [IMAGE, 291, START, END]] = -torch.inf
            out.append(logits.log_softmax(-1).gather(1, c[:, None])[:, 0])
    return torch.cat(out)


@torch.no_grad()
def test_passes_of_the_vision_tower_change_nothing(pair, monkeypatch):
    model, _ = pair
    together = model.score(PROMPTS, COMPLETIONS)[0]
    monkeypatch.setattr(ours, "PATCHES_AT_ONCE", 1)                      # an image each
    assert len(PROMPTS) > 1 and torch.allclose(model.score(PROMPTS, COMPLETIONS)[0], together, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_group_scores_and_gradients_equal_separate_sequences(pair, checkpointing):
    model, _ = pair
    weight = torch.randn(sum(len(c) for group in COMPLETIONS for c in group), generator=torch.Generator().manual_seed(3))
    model.visual.checkpointing = model.model.checkpointing = checkpointing
    shared, entropy = model.score(PROMPTS, COMPLETIONS, 0.7)
    grads = torch.autograd.grad((shared * weight).sum(), list(model.parameters()))
    model.visual.checkpointing = model.model.checkpointing = False
    apart = scored_apart(model, PROMPTS, COMPLETIONS, 0.7)
    assert torch.allclose(shared, apart, atol=1e-5)
    for got, want in zip(grads, torch.autograd.grad((apart * weight).sum(), list(model.parameters()))):
        assert relative(got, want) < 1e-4
    assert (entropy > 0).all() and (entropy < torch.tensor(300.0).log()).all()


def test_scoring_in_chunks_changes_nothing(pair, monkeypatch):
    model, _ = pair
    whole = model.score(PROMPTS, COMPLETIONS)
    monkeypatch.setattr(ours, "LOGITS_PER_CHUNK", 4 * 300)
    for got, want in zip(model.score(PROMPTS, COMPLETIONS), whole):
        assert torch.allclose(got, want, atol=1e-6)


def test_the_model_remembers_nothing_between_calls(pair):
    model, _ = pair
    with torch.no_grad():
        first = model.score(PROMPTS[:1], COMPLETIONS[:1])[0]
        model.score(PROMPTS[1:], COMPLETIONS[1:])
        assert torch.equal(first, model.score(PROMPTS[:1], COMPLETIONS[:1])[0])


# ---------------------------------------------------------------------------------------------------------------- checkpoints

def hub_config(path):
    """The nested config.json rewritten as the hub has it: flat, with rope_scaling, and eos beside it."""
    config = json.loads((path / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text.pop("model_type")
    vision = config["vision_config"]
    vision["in_chans"] = vision.pop("in_channels")
    (path / "config.json").write_text(json.dumps({**text, **config, "rope_theta": rope["rope_theta"], "rope_scaling": {
        "type": "mrope", "mrope_section": rope["mrope_section"]}}))


def test_flat_config_of_the_hub_reads_like_the_nested_one(tmp_path):
    random_checkpoint(tmp_path)
    nested = QwenVL.from_pretrained(tmp_path, dtype=None).config
    hub_config(tmp_path)
    assert QwenVL.from_pretrained(tmp_path, dtype=None).config == nested


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [10 ** 9, 100_000])
def test_what_we_save_loads_in_transformers_with_equal_logits(tmp_path, tied, shard_bytes):
    transformers = pytest.importorskip("transformers")
    random_checkpoint(tmp_path / "theirs", tied, torch.bfloat16)
    model = QwenVL.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    model.save_pretrained(tmp_path / "ours", shard_bytes=shard_bytes)
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16).float().eval()
    model = QwenVL.from_pretrained(tmp_path / "ours", dtype=None)
    assert model.lm_head.weight.dtype == torch.bfloat16                  # saved in the checkpoint's own dtype
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == (shard_bytes == 100_000)
    ids, mask, pixels, grids = padded(PROMPTS[:1], "left")
    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=pixels, image_grid_thw=grids, mm_token_type_ids=(ids == IMAGE).int()).logits
        assert relative(model.float()(ids, mask, pixels, grids), want) < 1e-5


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file
    random_checkpoint(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good, text = load_file(file), config.read_text()
    name = "visual.blocks.1.attn.qkv.bias"
    for bad, words in [({k: v for k, v in good.items() if k != name}, f"missing: {name}"),
                       ({**good, "extra.weight": good[name].clone()}, "extra.weight"),
                       ({**good, name: good[name][:-1].clone()}, rf"{name} is \(95,\)")]:
        save_file(bad, file)
        with pytest.raises(CheckpointError, match=words):
            QwenVL.from_pretrained(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        QwenVL.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="no weights at"):
        QwenVL.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="no weights at"):
        QwenVL.from_pretrained(tmp_path)
    for broken, words in [("{", "not a readable"), ("[]", "not a JSON object"),
                          (text.replace('"hidden_size": 64', '"hidden_size": []'), "not the config.json of"),
                          (text.replace("qwen2_5_vl", "llama", 1), "model_type is 'llama'"),
                          (text.replace("hidden_size", "width"), "hidden_size"), (text.replace("mrope_section", "m"), "mrope_section")]:
        config.write_text(broken)
        with pytest.raises(CheckpointError, match=words):
            QwenVL.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        QwenVL.from_pretrained(tmp_path / "nowhere")


def test_a_tied_checkpoint_may_carry_the_same_head_but_no_other(tmp_path):
    from safetensors.torch import load_file, save_file
    random_checkpoint(tmp_path, tied=True)
    good = load_file(tmp_path / "model.safetensors")
    good["lm_head.weight"] = good["model.embed_tokens.weight"].clone()
    save_file(good, tmp_path / "model.safetensors")
    model = QwenVL.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    good["lm_head.weight"] += 1
    save_file(good, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tied"):
        QwenVL.from_pretrained(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stored,asked", [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_loading_needs_no_more_than_the_weights(tmp_path, stored, asked):
    random_checkpoint(tmp_path, dtype=getattr(torch, stored), vocab_size=60_000, hidden_size=512, intermediate_size=2048,
                      rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 10000.0})
    code = f"""
import threading, time, torch, model
def anonymous():
    return sum(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
peak, before, stop = 0, anonymous(), False
def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
watcher = threading.Thread(target=watch)
watcher.start()
net = model.QwenVL.from_pretrained({str(tmp_path)!r}, dtype=torch.{asked})
stop = True
watcher.join()
print((max(peak, anonymous()) - before) / sum(p.nbytes for p in net.parameters()))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ours.__file__.rsplit("/", 1)[0])
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 1.15


def test_ids_without_a_text_and_vision_markers_are_banned(tmp_path):
    random_checkpoint(tmp_path)
    added = [{"id": 280 + i, "content": t} for i, t in enumerate(("<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"))]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {chr(200 + i): i for i in range(280)}}, "added_tokens": added}))
    model = QwenVL.from_pretrained(tmp_path)
    assert model.stop_ids == (281, 280)
    assert model.banned.nonzero()[:, 0].tolist() == list(range(282, 300))
    logp = model.distribution(torch.full((300,), 50.0), 2.0)
    assert torch.allclose(logp[:282].exp().sum(), torch.tensor(1.0)) and (logp[282:].exp() == 0).all()


@pytest.mark.parametrize("file, text", [
    ("tokenizer.json", '{"model": {"voc'), ("tokenizer.json", "[1]"), ("tokenizer.json", '{"model": 1}'),
    ("tokenizer.json", '{"model": {}}'), ("tokenizer.json", '{"model": {"vocab": {}}, "added_tokens": [1]}'),
    ("vocab.json", '{"a": 1, '), ("vocab.json", "[1]")])
def test_a_tokenizer_that_cant_be_read_is_refused_by_name(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{file}.* is not a tokenizer's \(.*; copy it again"):
        ours.read_token_ids(tmp_path)


def test_a_processor_of_another_model_is_refused_by_name(tiny_checkpoint, tmp_path):
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_checkpoint / name).read_bytes())
    model, file = QwenVL.from_pretrained(tmp_path), tmp_path / "preprocessor_config.json"
    model.check_processor(Processor.from_pretrained(tmp_path))
    good = json.loads(file.read_text())
    for name, value in (("patch_size", 16), ("merge_size", 1), ("temporal_patch_size", 1)):
        file.write_text(json.dumps({**good, name: value}))
        with pytest.raises(CheckpointError, match=f"preprocessor_config.json: {name} is {value}, but config.json asks for {good[name]}"):
            model.check_processor(Processor.from_pretrained(tmp_path))
    file.write_text(json.dumps(good))
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:                              # another model's: the same names, other ids
        token["id"] += 1
    tokenizer["model"]["vocab"]["<more>"] = 256
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="the tokenizer is another model's: its <.image_pad.> is 263, .* says 262 and 272 ids"):
        model.check_processor(Processor.from_pretrained(tmp_path))
    tokenizer = Processor.from_pretrained(tiny_checkpoint).tokenizer
    tokenizer.add_tokens([f"<{i}>" for i in range(9)])                   # ids 264 to 272; the embedding has 272 rows
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="its last id 272, but"):
        model.check_processor(Processor.from_pretrained(tmp_path))
