"""model.py and attention.py against transformers' three families (random weights), against
dense attention, and by hand."""
import dataclasses
import doctest
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import model as ours
from model import QwenVL, completion_layout, mrope_positions
from qwen import attention as kernels
from qwen import hub
from qwen.attention import Piece, Plan, attention, merge_attended
from qwen.hub import CheckpointError
from qwen.processor import Processor

IMAGE = 290
START = 292
END = 293
MARKERS = [IMAGE, 291, START, END]

Pair = tuple[QwenVL, Any]                 # our model and transformers', of one checkpoint


def random_checkpoint(
        path: Path, tied: bool = False, dtype: torch.dtype = torch.float32,
        family: str = "Qwen2.5-VL", **text: Any) -> Any:
    """A small random checkpoint of a family as transformers writes it; weights large
    enough that masks and positions matter."""
    pytest.importorskip("transformers")
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope,
        "bos_token_id": None, "eos_token_id": 17, **OWN_TEXT[family], **text}
    vision = {"depth": 4, "num_heads": 2, **OWN_VISION[family]}
    if family != "Qwen2-VL":
        vision["out_hidden_size"] = text["hidden_size"]
    theirs_config = theirs_of(family, "Config")(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=291,
        vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=tied)
    torch.manual_seed(0)
    theirs = theirs_of(family, "ForConditionalGeneration")(theirs_config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            spreads = {"bias": 0.3, "embed_tokens.weight": 1.0}
            spread = spreads.get(name.split(".", 3)[-1], 1.5 * p.shape[-1] ** -0.5)
            if p.ndim == 1:
                spread = 0.3
            p.copy_(torch.randn(p.shape) * spread + ("norm" in name or "ln_q" in name))
    theirs.to(dtype).save_pretrained(path)
    return theirs


# What a family's config.json has of its own. Two of Qwen3-VL's layers take deepstack features,
# and the third is the last, which skips rows. Its head is wider than hidden / heads.
OWN_TEXT = {
    "Qwen2-VL": {}, "Qwen2.5-VL": {},
    "Qwen3-VL": {
        "num_hidden_layers": 3, "head_dim": 24, "rope_parameters": {
            "rope_type": "default", "mrope_section": [4, 5, 3], "rope_theta": 10000.0}}}
OWN_VISION = {
    "Qwen2-VL": {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": 64},
    "Qwen2.5-VL": {
        "hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [1, 3],
        "window_size": 112},
    # The others' patches, so that all take the same prompts.
    "Qwen3-VL": {
        "hidden_size": 32, "intermediate_size": 48, "patch_size": 14,
        "num_position_embeddings": 49, "deepstack_visual_indexes": [2, 0]}}


def theirs_of(family: str, what: str) -> Any:
    """transformers' class of a family: its Config, its ForConditionalGeneration."""
    import transformers
    prefixes = {"Qwen2-VL": "Qwen2VL", "Qwen2.5-VL": "Qwen2_5_VL", "Qwen3-VL": "Qwen3VL"}
    return getattr(transformers, prefixes[family] + what)


CASES = [(family, tied) for family in hub.FAMILIES.values() for tied in (False, True)]


@pytest.fixture(
    scope="module", params=CASES, ids=[f"{f}-{'tied' if t else 'untied'}" for f, t in CASES])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = tmp_path_factory.mktemp("checkpoint")
    family, tied = request.param
    theirs = random_checkpoint(path, tied, family=family)
    return QwenVL.from_pretrained(path, dtype=torch.float32), theirs


@dataclasses.dataclass
class FloatPixels:
    """Patches as they are, in place of the bytes of a Processor."""

    values: Tensor

    def normalised(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        return self.values.to(device)


def prompt(
        grids: Sequence[tuple[int, int, int]], text: list[int],
        seed: int = 0) -> SimpleNamespace:
    """ids of one sequence with these images (t, h, w in patches), random patches: like
    Processor's, without a tokenizer."""
    ids = [3, 4]
    for t, h, w in grids:
        ids += [START, *[IMAGE] * (t * h * w // 4), END, 9]
    patches = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(patches, 1176, generator=torch.Generator().manual_seed(seed))
    return SimpleNamespace(
        input_ids=torch.tensor(ids + text), pixels=FloatPixels(pixels), pixel_values=pixels,
        image_grid_thw=torch.tensor(grids, dtype=torch.long).view(-1, 3))


PROMPTS = [
    # 308 x 476 px: windows cut at both edges.
    prompt([(1, 22, 34)], [5, 6, 7, 8], 0),
    # 112 px, exactly one window; 140 x 112.
    prompt([(1, 8, 8), (1, 10, 8)], list(range(20, 45)), 1),
    # A text alone.
    prompt([], [30, 31], 2),
]


def padded(prompts: Sequence[Any], side: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts -> ids (B, T), mask (B, T), pixel_values, image_grid_thw, as transformers
    takes them."""
    longest = max(len(p.input_ids) for p in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for i, p in enumerate(prompts):
        n = len(p.input_ids)
        where = slice(longest - n, None) if side == "left" else slice(n)
        ids[i, where] = p.input_ids
        mask[i, where] = 1
    pixels = torch.cat([p.pixel_values for p in prompts])
    grids = torch.cat([p.image_grid_thw for p in prompts])
    return ids, mask, pixels, grids


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("module", [kernels, ours])
def test_examples_in_docstrings_hold(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_transformers(pair: Pair, side: str) -> None:
    model, theirs = pair
    ids, mask, pixels, grids = padded(PROMPTS, side)
    with torch.no_grad():
        got = model(ids, mask, pixels, grids)
        want = theirs(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, image_grid_thw=grids,
            mm_token_type_ids=(ids == IMAGE).int()).logits
    assert got.shape == want.shape and relative(got[mask.bool()], want[mask.bool()]) < 1e-5
    assert (got[~mask.bool()] == 0).all()


def test_a_batch_of_unequal_prompts_equals_each_alone(pair: Pair) -> None:
    model, _ = pair
    ids, mask, pixels, grids = padded(PROMPTS, "left")
    with torch.no_grad():
        together = model(ids, mask, pixels, grids)
        for row, keep, p in zip(together, mask.bool(), PROMPTS):
            alone = model(p.input_ids[None], None, p.pixel_values, p.image_grid_thw)[0]
            assert relative(row[keep], alone) < 1e-5


def test_vision_tower_sees_windows_and_cut_windows(pair: Pair) -> None:
    """Tokens of another window do not reach a block that attends within windows:
    without full-attention blocks a change stays local."""
    model, _ = pair
    config = model.visual.config
    if not config.window:
        assert config.family != "Qwen2.5-VL"
        return
    tower = ours.VisionTower(type(config)(**{**config.__dict__, "full_blocks": ()}))
    tower.load_state_dict(model.visual.state_dict())
    pixels = PROMPTS[0].pixel_values.clone()
    with torch.no_grad():
        before = tower(pixels, [(1, 22, 34)])
        # The first token, row 0, column 0, lies in the window of tokens 0..3 x 0..3.
        pixels[:4] += 1.0
        difference = (tower(pixels, [(1, 22, 34)]) - before).abs().amax(1)
    changed = (difference > 1e-6).view(11, 17)
    assert changed[:4, :4].all() and changed.sum() == 16


def test_positions_by_hand() -> None:
    # Two text tokens, an image of 2 x 3 tokens, one text token: the image starts at 2,
    # and the text goes on at 2 + max(2, 3) = 5.
    ids = torch.tensor([7, 7, *[IMAGE] * 6, 7])
    [got] = mrope_positions([ids], [(1, 4, 6)], IMAGE, 2)
    assert got.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5], [0, 1, 2, 2, 2, 3, 3, 3, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]]
    with pytest.raises(ValueError, match="do not match"):
        mrope_positions([torch.tensor([IMAGE, 7])], [(1, 4, 6)], IMAGE, 2)


# --------------------------------------------------------------------------------- attention

def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q (N, H, hd), k and v (M, KV, hd), seen (N, M) bool -> (N, H, hd)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def seen_in_groups(prompts: list[int], completions: list[list[int]]) -> Tensor:
    """Who sees whom, written out token by token: prompts first, then each prompt's
    completions."""
    tokens = []                                  # (question, rollout or None, place)
    for q, length in enumerate(prompts):
        tokens += [(q, None, i) for i in range(length)]
    for q, group in enumerate(completions):
        for g, length in enumerate(group):
            tokens += [(q, g, i) for i in range(length)]
    seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, (question, rollout, place) in enumerate(tokens):
        for j, (other_question, other_rollout, other_place) in enumerate(tokens):
            same_sequence = (question, rollout) == (other_question, other_rollout)
            prompt_of_it = question == other_question and other_rollout is None
            if same_sequence:
                seen[i, j] = other_place <= place
            else:
                seen[i, j] = prompt_of_it
    return seen


def assert_equals_dense(plan: Plan, seen: Tensor) -> None:
    """Output and gradients of attention by a plan, on random numbers."""
    q, k, v, grad = (torch.randn(len(seen), heads, 8) * 2 for heads in (4, 2, 2, 4))
    results = []
    for f, shown in ((attention, plan), (dense, seen)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = f(*leaves, shown)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for got, want in zip(*results):
        assert relative(got, want) < 1e-5


@pytest.mark.parametrize("spelled_out", [False, True], ids=["kernel", "plain"])
def test_attention_over_groups_equals_dense_attention(
        spelled_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if spelled_out:
        monkeypatch.setattr(kernels, "CPU_KERNEL", False)
    prompts = [5, 9, 3]
    completions = [[4, 1, 4], [0, 2], [0, 0]]
    seen = seen_in_groups(prompts, completions)
    lengths = prompts + list(itertools.chain.from_iterable(completions))
    plan = Plan(lengths, prefix=[(n, sum(group)) for n, group in zip(prompts, completions)])
    torch.manual_seed(1)
    assert_equals_dense(plan, seen)


def test_attention_within_windows_is_not_causal() -> None:
    lengths = [4, 4, 2, 4, 1]
    owner = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    q, k, v = (torch.randn(15, 2, 8) for _ in range(3))
    got = attention(q, k, v, Plan(lengths, causal=False))
    assert torch.allclose(got, dense(q, k, v, owner[:, None] == owner), atol=1e-5)


ROWS = {"slice": slice(2, 5), "index": torch.tensor([4, 0, 3])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_a_merge_reaches_the_rows_it_is_given(
        rows: slice | Tensor, dtype: torch.dtype) -> None:
    """Attention over 6 keys, then merged with that over 4 others, is attention over all
    10: in these rows, and in no others."""
    torch.manual_seed(2)
    q = torch.randn(6, 2, 8)
    k, v = torch.randn(2, 10, 2, 8)

    def over(rows: slice | Tensor, keys: slice) -> tuple[Tensor, Tensor]:
        """out (rows, H, hd) and lse (H, rows) of these rows over these keys."""
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * 8 ** -0.5
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys])
        return out.to(dtype), scores.logsumexp(-1)

    all_rows = slice(None)
    out, lse = over(all_rows, slice(6))
    want_out, want_lse = out.clone(), lse.clone()
    want_out[rows], want_lse[:, rows] = over(rows, slice(10))
    merge_attended(out, lse, rows, *over(rows, slice(6, 10)))
    assert torch.allclose(out, want_out, atol=1e-6 if dtype == torch.float32 else 2e-2)
    assert torch.allclose(lse, want_lse, atol=1e-6)
    untouched = torch.ones(6, dtype=torch.bool)
    untouched[rows] = False
    assert torch.equal(out[untouched], want_out[untouched])


def test_pieces_with_index_rows_may_be_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack with completions that lie apart, as no Plan makes it: the piece that shows
    them their prompt has an index of rows. Forward and backward equal dense
    attention."""
    plan = Plan([3, 2, 4, 2])
    apart = torch.tensor([3, 4, 9, 10])
    prompt_piece = Piece(apart, slice(0, 3), 1, causal=False, written_before=True)
    plan.pieces.append(prompt_piece)
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor([3, 2, 4, 2]))
    seen = (owner[:, None] == owner).tril()
    seen[apart, :3] = True
    torch.manual_seed(3)
    assert_equals_dense(plan, seen)


def test_two_launches_with_boundaries_equal_dense_attention(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces for the variable-length kernel, here computed sequence by sequence."""
    attend = kernels.attend
    attend_backward = kernels.attend_backward

    def by_sequence(piece: Piece) -> list[tuple[slice, slice, Piece]]:
        queries, keys = (x.tolist() for x in piece.sequences[:2])
        one = dataclasses.replace(piece, sequences=1)
        rows = zip(itertools.pairwise(queries), itertools.pairwise(keys))
        return [(slice(*query), slice(*key), one) for query, key in rows]

    def forward(q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        results = [attend(q[rows], k[keys], v[keys], one) for rows, keys, one in by_sequence(piece)]
        return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results], 1)

    def backward(
            grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
            piece: Piece) -> list[Tensor]:
        parts = []
        for rows, keys, one in by_sequence(piece):
            parts.append(attend_backward(
                grad[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows], one))
        return [torch.cat(share) for share in zip(*parts)]

    monkeypatch.setattr(kernels, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(kernels, "KERNEL_DTYPES", (torch.float32,))
    monkeypatch.setattr(kernels, "attend", forward)
    monkeypatch.setattr(kernels, "attend_backward", backward)
    seen = seen_in_groups([5, 3], [[4, 1], [2]])
    plan = Plan([5, 3, 4, 1, 2], prefix=[(5, 5), (3, 2)])
    torch.manual_seed(5)
    assert_equals_dense(plan, seen)
    assert len(plan.kernel_pieces) == 2


def test_the_gradient_that_is_spelled_out_is_the_derivative(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CPU_KERNEL", False)
    torch.manual_seed(4)
    q = torch.randn(10, 4, 8, requires_grad=True)
    k = torch.randn(10, 2, 8, requires_grad=True)
    v = torch.randn(10, 2, 8, requires_grad=True)
    [piece] = Plan([5, 5]).pieces
    out, lse = kernels.attend(q, k, v, piece)
    grad = torch.randn_like(out)
    want = torch.autograd.grad(out, (q, k, v), grad)
    with torch.no_grad():
        got = kernels.attend_backward(grad, q, k, v, out, lse, piece)
    for a, b in zip(got, want):
        assert relative(a, b) < 1e-5


# ----------------------------------------------------------------------------------- scoring

COMPLETIONS = [
    [torch.tensor([1, 2, 17]), torch.tensor([9, 8, 7, 6, 5]), torch.tensor([17])],
    [torch.tensor([4, 17]), torch.tensor([3, 3, 3])],
    [torch.tensor([2]), torch.tensor([40, 41])]]
COMPLETION_TOKENS = 3 + 5 + 1 + 2 + 3 + 1 + 2


def scored_apart(
        model: QwenVL, prompts: Sequence[Any], completions: Sequence[Sequence[Tensor]],
        temperature: float) -> Tensor:
    """The plain slow path: every completion after a copy of its prompt, one forward
    pass each."""
    out = []
    for p, group in zip(prompts, completions):
        for c in group:
            ids = torch.cat((p.input_ids, c))[None]
            logits = model(ids, None, p.pixel_values, p.image_grid_thw)[0]
            logits = logits[len(p.input_ids) - 1:-1] / temperature
            logits[:, MARKERS] = -torch.inf
            out.append(logits.log_softmax(-1).gather(1, c[:, None])[:, 0])
    return torch.cat(out)


def test_completions_of_a_pack_by_hand() -> None:
    # One prompt in rows 0 and 1, completions of 1 and 2 tokens: row 2 is the second's first.
    fed_lengths, prefix, positions, predicting_rows = completion_layout([2], [7], [[1, 2]])
    assert fed_lengths == [0, 1] and prefix == [(2, 1)]
    assert positions.tolist() == [7] and predicting_rows.tolist() == [1, 1, 2]
    # Nothing at all is fed.
    _, prefix, positions, predicting_rows = completion_layout([2, 3], [2, 3], [[1], [1, 1]])
    assert prefix == [(2, 0), (3, 0)] and positions.dtype == torch.long
    assert predicting_rows.tolist() == [1, 4, 4]


@torch.no_grad()
def test_passes_of_the_vision_tower_change_nothing(
        pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair
    together, _ = model.score(PROMPTS, COMPLETIONS)
    # An image each.
    monkeypatch.setattr(ours, "PATCHES_AT_ONCE", 1)
    assert len(PROMPTS) > 1
    assert torch.allclose(model.score(PROMPTS, COMPLETIONS)[0], together, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_group_scores_and_gradients_equal_separate_sequences(
        pair: Pair, checkpointing: bool) -> None:
    model, _ = pair
    parameters = list(model.parameters())
    weight = torch.randn(COMPLETION_TOKENS, generator=torch.Generator().manual_seed(3))
    model.visual.checkpointing = model.model.checkpointing = checkpointing
    shared, entropy = model.score(PROMPTS, COMPLETIONS, 0.7)
    got = torch.autograd.grad((shared * weight).sum(), parameters)
    model.visual.checkpointing = model.model.checkpointing = False
    apart = scored_apart(model, PROMPTS, COMPLETIONS, 0.7)
    want = torch.autograd.grad((apart * weight).sum(), parameters)
    assert torch.allclose(shared, apart, atol=1e-5)
    for got_gradient, want_gradient in zip(got, want):
        assert relative(got_gradient, want_gradient) < 1e-4
    assert (entropy > 0).all() and (entropy < torch.tensor(300.0).log()).all()


def test_scoring_in_chunks_changes_nothing(
        pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair
    whole = model.score(PROMPTS, COMPLETIONS)
    monkeypatch.setattr(ours, "LOGITS_PER_CHUNK", 4 * 300)
    for got, want in zip(model.score(PROMPTS, COMPLETIONS), whole):
        assert torch.allclose(got, want, atol=1e-6)


def test_the_model_remembers_nothing_between_calls(pair: Pair) -> None:
    model, _ = pair
    with torch.no_grad():
        first, _ = model.score(PROMPTS[:1], COMPLETIONS[:1])
        model.score(PROMPTS[1:], COMPLETIONS[1:])
        again, _ = model.score(PROMPTS[:1], COMPLETIONS[:1])
    assert torch.equal(first, again)


# ------------------------------------------------------------------------------- checkpoints

def hub_config(path: Path) -> None:
    """The nested config.json rewritten as the hub has it: flat, with rope_scaling, and
    eos at the top."""
    config = json.loads((path / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text.pop("model_type")
    vision = config["vision_config"]
    vision["in_chans"] = vision.pop("in_channels")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat = {**text, **config, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    (path / "config.json").write_text(json.dumps(flat))


def test_flat_config_of_the_hub_reads_like_the_nested_one(tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    nested = QwenVL.from_pretrained(tmp_path, dtype=None).config
    hub_config(tmp_path)
    assert QwenVL.from_pretrained(tmp_path, dtype=None).config == nested


def stored_names(folder: Path) -> set[str]:
    """The tensors in a checkpoint's files."""
    names = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            names += stored.keys()
    return set(names)


@pytest.mark.parametrize("family, tied", CASES)
@pytest.mark.parametrize("shard_bytes", [10 ** 9, 100_000])
def test_what_we_save_loads_in_transformers_with_equal_logits(
        tmp_path: Path, family: str, tied: bool, shard_bytes: int) -> None:
    random_checkpoint(tmp_path / "theirs", tied, torch.bfloat16, family)
    model = QwenVL.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    model.save_pretrained(tmp_path / "ours", shard_bytes=shard_bytes)
    theirs = theirs_of(family, "ForConditionalGeneration").from_pretrained(
        tmp_path / "ours", dtype=torch.bfloat16).float().eval()
    model = QwenVL.from_pretrained(tmp_path / "ours", dtype=None)
    # Saved in the checkpoint's own dtype.
    assert model.lm_head.weight.dtype == torch.bfloat16
    # By the names that the checkpoint had.
    assert stored_names(tmp_path / "ours") == stored_names(tmp_path / "theirs")
    files = list((tmp_path / "ours").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 100_000)
    ids, mask, pixels, grids = padded(PROMPTS[:1], "left")
    with torch.no_grad():
        want = theirs(
            input_ids=ids, pixel_values=pixels, image_grid_thw=grids,
            mm_token_type_ids=(ids == IMAGE).int()).logits
        assert relative(model.float()(ids, mask, pixels, grids), want) < 1e-5


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    random_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    name = "visual.blocks.1.attn.qkv.bias"
    without = {k: v for k, v in good.items() if k != name}
    for bad, words in [
            (without, f"missing: {name}"),
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
    index = {"weight_map": {name: "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no weights at"):
        QwenVL.from_pretrained(tmp_path)


def test_a_config_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    for broken, words in [
            ("{", "not a readable JSON object"),
            ("[]", "not a readable JSON object .a list"),
            (text.replace('"hidden_size": 64', '"hidden_size": []'), "not the config.json of"),
            (text.replace("qwen2_5_vl", "llama", 1),
             "model_type is 'llama' .another model.; this code runs"),
            (text.replace("qwen2_5_vl", "qwen3_vl_moe", 1), "'qwen3_vl_moe' .Qwen3-VL-MoE.; "),
            (text.replace("qwen2_5_vl", "qwen3_5", 1), "is 'qwen3_5' .Qwen3.5.; "),
            (text.replace('"qwen2_5_vl"', '["qwen2_5_vl"]', 1), "model_type is .'qwen2_5_vl'."),
            (text.replace("hidden_size", "width"), "hidden_size"),
            (text.replace("mrope_section", "m"), "mrope_section")]:
        config.write_text(broken)
        with pytest.raises(CheckpointError, match=words):
            QwenVL.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        QwenVL.from_pretrained(tmp_path / "nowhere")


def test_a_tied_checkpoint_may_carry_the_same_head_but_no_other(tmp_path: Path) -> None:
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


# Run in a process of its own: anonymous memory while loading, over the bytes of the weights.
WATCHED_LOADING = """
import threading, time, torch, model
def anonymous():
    lines = open("/proc/self/status")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
peak, before, stop = 0, anonymous(), False
def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
watcher = threading.Thread(target=watch)
watcher.start()
net = model.QwenVL.from_pretrained({path!r}, dtype=torch.{dtype})
stop = True
watcher.join()
print((max(peak, anonymous()) - before) / sum(p.nbytes for p in net.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "stored,asked", [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_loading_needs_no_more_than_the_weights(
        tmp_path: Path, stored: str, asked: str) -> None:
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 10000.0}
    random_checkpoint(
        tmp_path, dtype=getattr(torch, stored), vocab_size=60_000, hidden_size=512,
        intermediate_size=2048, rope_parameters=rope)
    code = WATCHED_LOADING.format(path=str(tmp_path), dtype=asked)
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        cwd=Path(ours.__file__).parent)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 1.15


def test_ids_without_a_text_and_vision_markers_are_banned(tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    special = ("<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
    added = [{"id": 280 + i, "content": text} for i, text in enumerate(special)]
    vocab = {chr(200 + i): i for i in range(280)}
    tokenizer = {"model": {"vocab": vocab}, "added_tokens": added}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = QwenVL.from_pretrained(tmp_path)
    assert model.stop_ids == (281, 280)
    assert model.banned.nonzero()[:, 0].tolist() == list(range(282, 300))
    p = model.distribution(torch.full((300,), 50.0), 2.0).exp()
    assert torch.allclose(p[:282].sum(), torch.tensor(1.0)) and (p[282:] == 0).all()


def test_without_a_tokenizer_the_markers_of_config_json_are_banned(tmp_path: Path) -> None:
    random_checkpoint(tmp_path)
    model = QwenVL.from_pretrained(tmp_path)
    assert model.banned.nonzero()[:, 0].tolist() == MARKERS
    assert model.stop_ids == (17,)


@pytest.mark.parametrize("file, text", [
    ("tokenizer.json", '{"model": {"voc'),
    ("tokenizer.json", "[1]"),
    ("tokenizer.json", '{"model": 1}'),
    ("tokenizer.json", '{"model": {}}'),
    ("tokenizer.json", '{"model": {"vocab": {}}, "added_tokens": [1]}'),
    ("vocab.json", '{"a": 1, '),
    ("vocab.json", "[1]")])
def test_a_tokenizer_that_cant_be_read_is_refused_by_name(
        tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    words = rf"{file}: not a (tokenizer's|readable JSON object) \(.*; copy it again"
    with pytest.raises(CheckpointError, match=words):
        hub.read_token_ids(tmp_path)


def test_a_processor_of_another_model_is_refused_by_name(
        tiny_checkpoint: Path, tmp_path: Path) -> None:
    names = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json")
    for name in names:
        (tmp_path / name).write_bytes((tiny_checkpoint / name).read_bytes())
    model = QwenVL.from_pretrained(tmp_path)

    def refused(words: str) -> None:
        with pytest.raises(CheckpointError, match=words):
            Processor.from_pretrained(tmp_path).check_fits(model.config)

    Processor.from_pretrained(tmp_path).check_fits(model.config)
    file = tmp_path / "preprocessor_config.json"
    good = json.loads(file.read_text())
    for name, value in (("patch_size", 16), ("merge_size", 1), ("temporal_patch_size", 1)):
        file.write_text(json.dumps({**good, name: value}))
        refused(f"{file.name}: {name} is {value}, but config.json asks for {good[name]}")
    file.write_text(json.dumps({**good, "processor_class": "Qwen2VLProcessor"}))
    refused(f"{file.name}: the family is Qwen2-VL, but config.json asks for Qwen2.5")
    file.write_text(json.dumps(good))

    # Another model's tokenizer: the same names, other ids.
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["id"] += 1
    tokenizer["model"]["vocab"]["<more>"] = 256
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("<.image_pad.> is 263, but config.json asks for 262")

    # Ids 264 to 272; the embedding has 272 rows.
    more = Processor.from_pretrained(tiny_checkpoint).tokenizer
    more.add_tokens([f"<{i}>" for i in range(9)])
    more.save(str(tmp_path / "tokenizer.json"))
    refused("last id is 272, but")
