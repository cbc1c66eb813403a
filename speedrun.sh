#!/usr/bin/env bash
# The whole story on embedded data, from a fresh machine: environment -> the small base -> GRPO
# from it -> CoT-SFT -> RSGround-R1 -> one table, one picture, and what the last stage adds. A
# quarter of an hour on two CPU cores. It can be stopped at any time and started again: what is
# finished stands, the rest goes on. Everything is written below ckpt/; without that folder it
# begins anew. A quick look, with a Python that has the packages:
#   PY=python CKPT=ckpt/look SFT=20 DIRECT=2 RFT=2 TEST=20 bash speedrun.sh
set -euo pipefail
cd "$(dirname "$0")"
# Threads that wait spin shortly, then sleep: full speed alone, and no thrashing beside other work.
export GOMP_SPINCOUNT=10000

# 1. The six packages.
if [ -z "${PY:-}" ]; then
  PY=.venv/bin/python
  [ -x $PY ] || python3 -m venv .venv
  $PY -m pip install --quiet --disable-pip-version-check -r requirements.txt
fi
RUN=$PY
CKPT=${CKPT:-ckpt}
. study/once.sh

# 2. toy/base, a Qwen2.5-VL shape of two million parameters, knows the embedded world's things and
#    where they lie, and answers in the format where one of them alone has the name. Its scores
#    will stand beside the stages'.
mkdir -p "$CKPT"
ln -sfn "$PWD/toy/base" "$CKPT/base"

# 3. GRPO at once, with the settings of step 5 and fewer steps.
sample="--data synth-tiny --prompts 32 --temperature 0.8 --beta 0 --lr 3e-4 --freeze-vision"
sample+=" --micro-tokens 16384 --max-new-tokens 160"
train "$CKPT/direct" rft.py --init toy/base --steps ${DIRECT:-15} --every 10 $sample

# 4. CoT-SFT. Reasoning is expensive, boxes are not: 400 records with reasoning, written from their
#    annotations. Scenes are full-sized and full of things.
train "$CKPT/sft" sft.py --data synth:0.1 --init toy/base --steps ${SFT:-100} --batch 16 \
  --lr 1.5e-3 --freeze-vision --every 50 --max-new-tokens 160

# 5. RSGround-R1: RFT from CoT-SFT on boxes alone, of things as small as things get, one a scene:
#    answers miss by a few pixels, which is what RFT mends. Groups of eight sampled answers,
#    rewarded for overlap, nearness and format; groups that fail or scatter weigh more. Reward and
#    weights are the paper's; no reference is kept: the study's setting.
train "$CKPT/rft" rft.py --init "$CKPT/sft" --steps ${RFT:-40} --every 20 $sample

# 6. Scores on scenes that no stage has seen: tiny things, greedy and sampled, and without looking
#    at the image; the full-sized world; and what is unfamiliar there.
few="--limit ${TEST:-500} --max-new-tokens 160 --batch 125"
score "$CKPT/eval" "$CKPT/" --data synth-tiny --temperature 0 1 $few >/dev/null
score "$CKPT/eval_blind" "$CKPT/rft" --data synth-tiny --blind $few >/dev/null
score "$CKPT/eval_full" "$CKPT/" --data synth $few >/dev/null
score "$CKPT/eval_novel" "$CKPT/" --data synth --split novel $few >/dev/null

# 7. The table, the picture, and what RFT changed on the same scenes, greedy, with a 95% interval.
$RUN study/story.py "$CKPT"
