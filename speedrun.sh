#!/usr/bin/env bash
# The whole story on embedded data, from a fresh machine: environment -> the small base -> CoT-SFT -> RFT -> scores of every stage.
# Two CPU cores are enough. Everything is written below ckpt/; a second run wants that folder gone or renamed.
set -euo pipefail
cd "$(dirname "$0")"
export GOMP_SPINCOUNT=10000          # threads that wait spin shortly, then sleep: full speed alone, and no thrashing beside other work

# 1. The six packages.
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt

# 2. CoT-SFT from toy/base, a Qwen2.5-VL shape of two million parameters that knows the embedded world's things and where they lie, but neither
#    reasoning nor the answer format: reasoning about positions, written from annotations, that ends in a box.
mkdir ckpt && ln -s ../toy/base ckpt/base                             # its scores will stand beside the stages'
.venv/bin/python sft.py --init toy/base --steps 1100 --batch 16 --lr 1.5e-3 --every 550 --max-new-tokens 220

# 3. RFT: groups of eight sampled answers, rewarded for overlap, nearness and format; groups that agree in space weigh more.
.venv/bin/python rft.py --steps 60 --prompts 16 --micro-tokens 16384 --lr 1.5e-4 --every 30 --max-new-tokens 220

# 4. Scores on scenes that no stage has seen: greedy and sampled; without looking at the image; and where everything is unfamiliar.
.venv/bin/python eval.py ckpt/ --temperature 0 1 --limit 200 --max-new-tokens 220 --batch 100
.venv/bin/python eval.py ckpt/rft --blind --limit 200 --max-new-tokens 220 --batch 100 --out ckpt/eval/blind
.venv/bin/python eval.py ckpt/ --split novel --limit 200 --max-new-tokens 220 --batch 100 --out ckpt/eval/novel
