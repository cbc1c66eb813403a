#!/usr/bin/env bash
# The study: the paper's four ablations on the embedded world beside their controls, and a map of
# where the positional term pays. One command a table:
#   bash study/ablate.sh start       does CoT-SFT matter?
#   bash study/ablate.sh reward      which reward?
#   bash study/ablate.sh weight      which weight of a group?
#   bash study/ablate.sh stability   is training calmer, and do more steps help?
#   bash study/ablate.sh map         where does the positional term pay?
# Hours each on two cores. It can be stopped at any time and run again: what is finished stands,
# what was stopped goes on; tables share the runs that they have in common. At its end
# study/study.py writes the tables and the figure. All arms of a table have the same questions
# and steps.
#
# A quick look:
#   STUDY=ckpt/look SEEDS=0 SFT=100 RFT=20 TEST=40 bash study/ablate.sh reward
# Without a table's name, ARMS in REGIMES (by default all four tables').
# A variant of yours beside the others, as flags of rft.py; a study has one of them:
#   ARMS=own OWN="--alpha 10" bash study/ablate.sh
# One core for a seed, another one beside it:
#   OMP_NUM_THREADS=1 SEEDS=0 taskset -c 0 bash study/ablate.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export GOMP_SPINCOUNT=10000         # threads that wait spin shortly, then sleep

PY=${PY:-.venv/bin/python}
STUDY=${STUDY:-ckpt/study}          # the folder that everything is written to
REGIMES=${REGIMES:-}                # where empty, the table's
SEEDS=${SEEDS:-0 1 2}
SFT=${SFT:-100}                     # steps of CoT-SFT; more or fewer in some regimes
RFT=${RFT:-90}                      # steps of RFT; a third where one thing is in a scene
TEST=${TEST:-2000}                  # scenes of the split final to score on
OWN=${OWN:-}                        # flags of the arm "own"

fail() {
  echo "ablate.sh: $1" >&2
  exit 2
}

# What a table needs: its arms, the arm that is also asked without the image, and its regimes.
blind=""
set_table() {
  case $1 in
    start)        # base: as it is; direct: RFT from it; boxes: SFT on boxes for equal compute
      arms="base direct iou consistency boxes" blind=consistency regimes="tiny little" ;;
    reward)       # IoU and format, and which term beside them
      arms="iou giou diou center positional" blind=positional regimes=tiny ;;
    weight)       # positional: none; shuffled: the same weights, dealt to other groups
      arms="positional mean variance consistency shuffled" blind=consistency regimes=tiny ;;
    stability)    # positional: the same reward without weights; longer: twice the steps
      arms="iou positional consistency longer consistency-longer"
      blind=consistency-longer regimes=tiny ;;
    map)
      arms="iou positional" blind=positional regimes="choice small one tiny one-coarse" ;;
    "") arms="base direct iou giou diou center positional mean variance consistency shuffled boxes"
      arms+=" longer consistency-longer" regimes="tiny little" ;;
    *) fail "no table $1; there are start, reward, weight, stability, map" ;;
  esac
}

[ $# -le 1 ] || fail "one table at a time: start, reward, weight, stability or map"
set_table "${1:-}"
ARMS=${ARMS:-$arms}
REGIMES=${REGIMES:-$regimes}

# What a regime is: the records of SFT and its steps, the data of RFT and its steps, and whether
# advantages are divided by their group's standard deviation. With the division a group whose boxes
# differ by a pixel weighs as much as one whose choices differ: where things are many it is left
# out. Without it a group that misses altogether, which the positional term alone tells apart, moves
# next to nothing: where misses are the question (the map) it stays on.
set_regime() {
  local third=$(((RFT + 2) / 3))
  start=synth_0.1             # folder of the SFT model, which regimes share
  learn=synth:0.1 steps=$SFT rft=$RFT std="" root=()
  case $1 in
    tiny)         # RFT on one thing a scene, as small as things get
      data=synth-tiny rft=$third ;;
    little)       # SFT on a tenth of its records, RFT on the world as it is
      data=synth std=--no-std ;;
    wide)         # SFT on all of its records
      start=synth learn=synth steps=$((SFT * 10)) data=synth std=--no-std ;;
    # The map. In choice and small a miss is mostly a wrong choice, as scenes are full of other
    # things; in the others nothing else is there to be chosen.
    choice) data=synth ;;
    small)        # everything is half as long
      data=synth-small ;;
    one)          # one thing a scene
      data=synth-one rft=$third ;;
    one-coarse)   # one thing, and SFT on boxes that lie beside the things
      data=synth-one rft=$third learn=jsonl root=(--root "$STUDY/coarse") start=coarse ;;
    *) fail "no regime $1; there are tiny, little, wide, choice, small, one, one-coarse" ;;
  esac
}

# train_sft FOLDER FLAGS: stage 1, or the control on boxes.
train_sft() {
  train "$1" sft.py "${@:2}" --freeze-vision --max-new-tokens 160 --seed "$seed"
}

# train_rft FOLDER INIT STEPS FLAGS: stage 2 in this regime, for this seed. FLAGS come last, for
# those of the arm "own" go before what stands here.
train_rft() {
  train "$1" rft.py --init "$2" --steps "$3" --data $data $std --prompts 32 --temperature 0.8 \
    --lr 3e-4 --beta 0 --freeze-vision --every 40 --micro-tokens 16384 --max-new-tokens 160 \
    --seed "$seed" "${@:4}"
}

# train_arm ARM: sets $model to what is to be scored.
train_arm() {
  local iou="iou=1 format=1"
  local long=$((2 * rft)) boxes=$((10 * rft))
  model=$here/$1
  case $1 in
    sft) model=$sft ;;
    base) model=toy/base ;;
    direct) train_rft "$model" toy/base "$rft" --reward $iou --weighting off ;;
    iou) train_rft "$model" "$sft" "$rft" --reward $iou --weighting off ;;
    giou | diou | center | positional)
      train_rft "$model" "$sft" "$rft" --reward $iou "$1=0.1" --weighting off ;;
    # With no --reward the paper's: IoU, the positional term at 0.1, format.
    mean | variance | consistency | shuffled)
      train_rft "$model" "$sft" "$rft" --weighting "$1" ;;
    longer) train_rft "$model" "$sft" $long --reward $iou --weighting off ;;
    consistency-longer) train_rft "$model" "$sft" $long --weighting consistency ;;
    own) train_rft "$model" "$sft" "$rft" --weighting off $OWN ;;
    # As long as RFT takes: one of its steps of 256 rollouts, made and learned from, costs what
    # ten steps of 32 answers cost.
    boxes)
      train_sft "$model" --data $data --split rft --answer-only --init "$sft" \
        --steps $boxes --every $boxes --batch 32 --lr 5e-4 ;;
  esac
}

# score_arm DATA SPLIT [NAME FLAGS]: $model, greedy unless flags say otherwise; each in a folder of
# its name. Scenes that are scored in several ways are the same.
score_arm() {
  score "$here/$arm/eval_$2${3:+_$3}" "$model" --data "$1" --split "$2" --limit "$TEST" \
    --max-new-tokens 160 --batch 125 "${@:4}"
}

# Mistakes are told before hours of training.
command -v ${PY%% *} >/dev/null || fail "no $PY; bash test.sh makes .venv, or set PY"
RUN=$PY
. study/once.sh
for regime in $REGIMES; do set_regime "$regime"; done
for arm in $ARMS; do
  case $arm in
    sft | base | direct | iou | giou | diou | center | positional) ;;
    mean | variance | consistency | shuffled | boxes | longer | consistency-longer) ;;
    own) [ -n "$OWN" ] || fail "OWN says what your variant changes, as flags of rft.py" ;;
    *) fail "no arm $arm; there are base, direct, iou, giou, diou, center, positional, mean,\
 variance, consistency, shuffled, boxes, longer, consistency-longer, own" ;;
  esac
done

for seed in $SEEDS; do
  for regime in $REGIMES; do
    set_regime "$regime"
    here=$STUDY/$regime/$seed
    sft=$STUDY/sft_$start/$seed
    if [ $start = coarse ] && [ ! -e "$STUDY/coarse/train.jsonl" ]; then
      $PY study/coarse.py "$STUDY/coarse"
    fi
    train_sft "$sft" --data $learn "${root[@]}" --init toy/base --steps "$steps" --every "$steps" \
      --batch 16 --lr 1.5e-3
    for arm in sft $ARMS; do
      train_arm "$arm"
      score_arm $data final
      score_arm $data final T1 --temperature 1
      score_arm synth novel
      if [ "$arm" = "$blind" ]; then score_arm $data final blind --blind; fi
      # Sampling SFT cooler is the control of all RFT: it might do no more than sharpen.
      if [ "$arm" = sft ]; then
        score_arm $data final T0.8 --temperature 0.8
        score_arm $data final T0.6 --temperature 0.6
      fi
    done
  done
done
$PY study/study.py "$STUDY"
