#!/usr/bin/env bash
# From a fresh machine to RSGround-R1 on embedded data: environment -> small base -> GRPO from the
# base -> CoT-SFT -> RFT -> one table, one picture, and what the last stage adds. A quarter of an
# hour on two CPU cores. Stop it at any time: the same command resumes, and does not repeat what is
# finished. All output is in ckpt/; delete that folder to begin anew.
# A quick look, with a Python that has the packages:
#   PY=python CKPT=ckpt/look SFT=20 DIRECT=2 RFT=2 TEST=20 bash speedrun.sh
set -euo pipefail
cd "$(dirname "$0")"
# Waiting threads spin briefly, then sleep: full speed alone, no thrashing with other processes.
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

# 2. toy/base has the architecture of Qwen2.5-VL and two million parameters. It knows the objects of
#    the embedded world and their positions, and answers in the format if only one has the name. It
#    is scored like the stages.
mkdir -p "$CKPT"
ln -sfn "$PWD/toy/base" "$CKPT/base"

# 3. GRPO from the base, with the settings of step 5 and fewer steps.
sample="--data synth-tiny --prompts 32 --temperature 0.8 --beta 0 --lr 3e-4 --freeze-vision"
sample+=" --micro-tokens 16384 --max-new-tokens 160"
train "$CKPT/direct" rft.py --init toy/base --steps ${DIRECT:-15} --every 10 $sample

# 4. CoT-SFT. Reasoning is expensive, boxes are not: 400 records with reasoning, written from their
#    annotations. The scenes are full-sized, with many objects.
train "$CKPT/sft" sft.py --data synth:0.1 --init toy/base --steps ${SFT:-100} --batch 16 \
  --lr 1.5e-3 --freeze-vision --every 50 --max-new-tokens 160

# 5. RSGround-R1: RFT from CoT-SFT on boxes alone, with one tiny object in each scene: answers miss
#    by a few pixels, and RFT corrects that. Groups of eight sampled answers are rewarded for
#    overlap, nearness and format; groups that fail or scatter weigh more. Reward and weights are
#    the paper's. As in the study, there is no reference model.
train "$CKPT/rft" rft.py --init "$CKPT/sft" --steps ${RFT:-40} --every 20 $sample

# 6. Scores on scenes that no stage has seen: tiny objects, greedy and sampled, and without the
#    image; the full-sized world; and what is unfamiliar there.
few="--limit ${TEST:-500} --max-new-tokens 160 --batch 125"
score "$CKPT/eval" "$CKPT/" --data synth-tiny --temperature 0 1 $few >/dev/null
score "$CKPT/eval_blind" "$CKPT/rft" --data synth-tiny --blind $few >/dev/null
score "$CKPT/eval_full" "$CKPT/" --data synth $few >/dev/null
score "$CKPT/eval_novel" "$CKPT/" --data synth --split novel $few >/dev/null

# 7. The table, the picture, and the difference that RFT makes on the same scenes, with interval.
$RUN study/story.py "$CKPT"
