#!/usr/bin/env bash
# The method from a fresh machine, in about 15 minutes on two CPU cores: environment -> a small
# base -> GRPO from the base -> CoT-SFT -> RSGround-R1 -> one table, one picture, and what the
# reasoning adds. Stop it at any time: the same command resumes, and does not repeat what is
# finished. All output is in ckpt/; delete that folder to begin anew.
# A quick look of 3 minutes, with a Python that has the packages:
#   PY=python CKPT=ckpt/look SFT=60 DIRECT=4 RFT=6 TEST=40 bash speedrun.sh
set -euo pipefail
cd "$(dirname "$0")"
# Waiting threads spin briefly, then sleep: full speed alone, no thrashing with other processes.
export GOMP_SPINCOUNT=10000

# setting NAME DEFAULT: the environment's value if it has one. With less than the default, this run
# is a quick look.
look=""
setting() {
  printf -v "$1" %s "${!1:-$2}"
  if [ "${!1}" -lt "$2" ]; then look+=" $1=${!1}"; fi
}
setting SFT 800               # steps of CoT-SFT
setting DIRECT 40             # steps of GRPO from the base: as many as of RFT
setting RFT 40                # steps of RFT from CoT-SFT
setting TEST 500              # test scenes

# 1. The six packages.
if [ -z "${PY:-}" ]; then
  PY=.venv/bin/python
  [ -x $PY ] || python3 -m venv .venv
  $PY -m pip install --quiet --disable-pip-version-check -r requirements.txt
fi
RUN=$PY
CKPT=${CKPT:-ckpt}
. study/once.sh

# 2. toy/base has the architecture of Qwen2.5-VL and two million parameters. It knows the things of
#    the embedded world and the words of place, and answers in the format if only one thing has the
#    name. It is scored like the stages.
mkdir -p "$CKPT"
ln -sfn "$PWD/toy/base" "$CKPT/base"

# 3. GRPO from the base, which is what one would try without the method. Groups of eight sampled
#    answers are rewarded for overlap and format. Step 5 has the same number of steps and the same
#    settings, apart from its start, its reward and its weights. As in the study, there is no
#    reference model.
sample="--data synth --prompts 32 --group 8 --temperature 0.8 --beta 0 --no-std --freeze-vision"
sample+=" --lr 2e-4 3 --micro-tokens 16384 --max-new-tokens 192 --every 15"
train "$CKPT/direct" rft.py --init toy/base --steps "$DIRECT" $sample \
  --reward iou=1 format=1 --weighting off

# 4. CoT-SFT: reasoning that is written from the annotations, then the box.
train "$CKPT/sft" sft.py --data synth --init toy/base --steps "$SFT" --batch 16 --lr 1.5e-3 \
  --freeze-vision --every 200 --max-new-tokens 192

# 5. RSGround-R1: RFT from CoT-SFT on boxes alone, with the paper's reward and weights: overlap,
#    nearness and format; groups that miss or scatter weigh more.
train "$CKPT/rft" rft.py --init "$CKPT/sft" --steps "$RFT" $sample

# 6. Greedy answers about scenes that no stage has seen, and those of the last stage without the
#    image. For the picture, eight sampled answers before and after RFT.
some="--data synth --max-new-tokens 192 --batch 125 --limit"
few=$((TEST < 64 ? TEST : 64))
score "$CKPT/eval" "$CKPT/" $some "$TEST" >/dev/null
score "$CKPT/eval_blind" "$CKPT/rft" --blind $some "$TEST" >/dev/null
for stage in sft rft; do
  score "$CKPT/eval_samples_$stage" "$CKPT/$stage" --samples 8 --temperature 1 $some "$few" \
    >/dev/null
done

# 7. The table, the picture, and what the last stage adds to GRPO from the base.
$RUN study/story.py "$CKPT"
if [ -n "$look" ]; then
  echo "This was a quick look ($(echo $look), less than the default): its figures mean nothing."
fi
