#!/usr/bin/env bash
# The whole story on embedded data, from a fresh machine: environment -> the small base -> CoT-SFT
# -> RFT -> scores of every stage. Two CPU cores are enough. Everything is written below ckpt/;
# a second run wants that folder gone or renamed.
set -euo pipefail
cd "$(dirname "$0")"
# Threads that wait spin shortly, then sleep: full speed alone, and no thrashing beside other work.
export GOMP_SPINCOUNT=10000

# 1. The six packages.
[ -x .venv/bin/python ] || python3 -m venv .venv
PY=.venv/bin/python
$PY -m pip install --quiet --disable-pip-version-check -r requirements.txt

# 2. CoT-SFT from toy/base, a Qwen2.5-VL shape of two million parameters. It knows the embedded
#    world's things and where they lie, but neither reasoning nor the answer format. Reasoning is
#    expensive, boxes are not: 400 records with reasoning, written from their annotations.
mkdir ckpt
ln -s ../toy/base ckpt/base      # its scores will stand beside the stages'
$PY sft.py --data synth:0.1 --init toy/base --steps 300 --batch 16 --lr 1.5e-3 --freeze-vision \
  --every 150 --max-new-tokens 160

# 3. RFT on boxes alone: groups of eight sampled answers, rewarded for overlap, nearness and
#    format; groups that fail or scatter weigh more. Reward and weights are the paper's. Sampling is
#    cool, advantages keep their size and no reference is kept: the study's setting.
$PY rft.py --steps 100 --prompts 32 --temperature 0.6 --no-std --beta 0 --lr 2e-4 --freeze-vision \
  --micro-tokens 16384 --every 50 --max-new-tokens 160

# 4. Scores on scenes that no stage has seen: greedy and sampled; without looking at the image; and
#    where everything is unfamiliar.
score="--limit 500 --max-new-tokens 160 --batch 125"
$PY eval.py ckpt/ --temperature 0 1 $score
$PY eval.py ckpt/rft --blind $score --out ckpt/eval/blind
$PY eval.py ckpt/ --split novel $score --out ckpt/eval/novel

# 5. What RFT changed on the same scenes, greedy, with a 95% interval.
$PY eval.py --compare ckpt/eval/predictions_sft.jsonl ckpt/eval/predictions_rft.jsonl \
  --data synth --limit 500
