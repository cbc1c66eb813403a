#!/usr/bin/env bash
# The whole story on embedded data, from a fresh machine: environment -> a small base -> CoT-SFT -> RFT -> scores of every stage.
# Two CPU cores are enough. Everything is written below ckpt/; a second run wants that folder gone or renamed.
set -euo pipefail
cd "$(dirname "$0")"
export GOMP_SPINCOUNT=10000          # threads that wait spin shortly, then sleep: full speed alone, and no thrashing beside other work

# 1. The six packages.
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt

# 2. Real weights can't ship with the code, so a Qwen2.5-VL shape of two million parameters learns the small world: the things in it, their
#    colours, and where they lie. It knows neither reasoning nor the answer format afterwards.
.venv/bin/python toy/pretrain.py

# 3. CoT-SFT: reasoning about positions, written from annotations, that ends in a box.
.venv/bin/python sft.py --steps 1100 --batch 16 --lr 1.5e-3 --every 550 --max-new-tokens 180

# 4. RFT: groups of eight sampled answers, rewarded for overlap, nearness and format; groups that agree in space weigh more.
.venv/bin/python rft.py --steps 30 --prompts 16 --micro-tokens 16384 --lr 1e-4 --every 15 --max-new-tokens 180

# 5. Scores on scenes that no stage has seen: greedy and sampled, and what is left without looking at the image.
.venv/bin/python eval.py ckpt/ --temperature 0 1 --limit 200 --max-new-tokens 180 --batch 100
.venv/bin/python eval.py ckpt/rft --blind --limit 200 --max-new-tokens 180 --batch 100 --out ckpt/eval/blind
