#!/usr/bin/env bash
# The study: the paper's four ablations on the embedded world, beside their controls, in several
# regimes and for several seeds. Hours on two cores. It can be stopped at any time and run again:
# what is finished stands, what was stopped goes on. At its end study/study.py writes the tables
# and the figure.
#
# A quick look:
#   STUDY=ckpt/look REGIMES=little SEEDS=0 SFT=100 RFT=20 TEST=40 bash study/ablate.sh
# A variant of yours beside the others, as flags of rft.py; a study has one of them:
#   ARMS=own OWN="--alpha 10" bash study/ablate.sh
# One core for a seed, another one beside it:
#   OMP_NUM_THREADS=1 SEEDS=0 taskset -c 0 bash study/ablate.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export GOMP_SPINCOUNT=10000         # threads that wait spin shortly, then sleep

PY=${PY:-.venv/bin/python}
STUDY=${STUDY:-ckpt/study}          # the folder that everything is written to
REGIMES=${REGIMES:-little small wide}
SEEDS=${SEEDS:-0 1 2}
SFT=${SFT:-}                        # steps of CoT-SFT; where empty, the regime's
RFT=${RFT:-120}                     # steps of RFT
TEST=${TEST:-1000}                  # scenes to score on
OWN=${OWN:-}                        # flags of the arm "own"

# Does CoT-SFT matter? (base: as it is; direct: RFT from it; iou: RFT from CoT-SFT)
START="base direct iou"
# Which term beside IoU and format?
REWARDS="giou diou center positional"
# Which weight of a group? (positional has none; shuffled: the same weights, dealt to other groups)
WEIGHTS="mean variance consistency shuffled"
# What do the same boxes give without RFT?
CONTROL="boxes"
# Does it stay good for twice the steps? (of iou and of consistency)
STABILITY="longer consistency-longer"
ARMS=${ARMS:-$START $REWARDS $WEIGHTS $CONTROL $STABILITY}

fail() {
  echo "ablate.sh: $1" >&2
  exit 2
}

# What a regime is: the records of SFT and its steps, the data of RFT, and whether advantages are
# divided by their group's standard deviation. Without the division a group that misses altogether,
# which the positional term alone tells apart, moves next to nothing: where such groups are the
# question (small) it stays on.
set_regime() {
  case $1 in
    little)       # SFT on a tenth of its records, RFT on the world as it is
      learn=synth:0.1 steps=${SFT:-300} data=synth std=--no-std ;;
    small)        # the same SFT, RFT where everything is half as long
      learn=synth:0.1 steps=${SFT:-300} data=synth-small std="" ;;
    wide)         # SFT on all of its records
      learn=synth steps=${SFT:-1000} data=synth std=--no-std ;;
    *) fail "no regime $1; there are little, small, wide" ;;
  esac
}

# train FOLDER COMMAND: once, and with --resume where it was stopped.
train() {
  local out=$1 resume=""
  shift
  if [ -e "$out/done" ]; then return; fi
  if [ -e "$out/latest" ]; then resume=--resume; else rm -rf "$out"; fi
  $PY "$@" --out "$out" $resume
  touch "$out/done"
}

# train_sft FOLDER FLAGS: stage 1, or the control on boxes.
train_sft() {
  train "$1" sft.py "${@:2}" --freeze-vision --max-new-tokens 160 --seed "$seed"
}

# train_rft FOLDER INIT STEPS FLAGS: stage 2 in this regime, for this seed. FLAGS come last, for
# those of the arm "own" go before what stands here.
train_rft() {
  train "$1" rft.py --init "$2" --steps "$3" --data $data $std --prompts 32 --temperature 0.6 \
    --lr 2e-4 --beta 0 --freeze-vision --every 40 --micro-tokens 16384 --max-new-tokens 160 \
    --seed "$seed" "${@:4}"
}

# train_arm ARM: sets $model to what is to be scored.
train_arm() {
  local iou="iou=1 format=1"
  local long=$((2 * RFT)) boxes=$((10 * RFT))
  model=$here/$1
  case $1 in
    sft) model=$sft ;;
    base) model=toy/base ;;
    direct) train_rft "$model" toy/base "$RFT" --reward $iou --weighting off ;;
    iou) train_rft "$model" "$sft" "$RFT" --reward $iou --weighting off ;;
    giou | diou | center | positional)
      train_rft "$model" "$sft" "$RFT" --reward $iou "$1=0.1" --weighting off ;;
    # With no --reward the paper's: IoU, the positional term at 0.1, format.
    mean | variance | consistency | shuffled)
      train_rft "$model" "$sft" "$RFT" --weighting "$1" ;;
    longer) train_rft "$model" "$sft" $long --reward $iou --weighting off ;;
    consistency-longer) train_rft "$model" "$sft" $long --weighting consistency ;;
    own) train_rft "$model" "$sft" "$RFT" --weighting off $OWN ;;
    # As long as RFT takes: one of its steps of 256 rollouts, made and learned from, costs what
    # ten steps of 32 answers cost.
    boxes)
      train_sft "$model" --data $data --split rft --answer-only --init "$sft" \
        --steps $boxes --every $boxes --batch 32 --lr 5e-4 ;;
  esac
}

# score DATA SPLIT [TEMPERATURE]: $model, greedy unless a temperature is named; a folder for each.
score() {
  local out=$here/$arm/eval_$2${3:+_T$3}
  if [ -e "$out/report.html" ]; then return; fi
  $PY eval.py "$model" --data "$1" --split "$2" --temperature "${3:-0}" --limit "$TEST" \
    --max-new-tokens 160 --batch 125 --out "$out"
}

# Mistakes are told before hours of training.
command -v ${PY%% *} >/dev/null || fail "no $PY; bash test.sh makes .venv, or set PY"
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
    # Regimes that learn from the same records share their SFT model.
    sft=$STUDY/sft_${learn/:/_}/$seed
    train_sft "$sft" --data $learn --init toy/base --steps "$steps" --every "$steps" \
      --batch 16 --lr 1.5e-3
    for arm in sft $ARMS; do
      train_arm "$arm"
      score $data test
      score $data test 1
      if [ $data = synth ]; then score synth novel; fi
      # Sampling SFT cooler is the control of all RFT: it might do no more than sharpen.
      if [ "$arm" = sft ]; then
        score $data test 0.8
        score $data test 0.6
      fi
    done
  done
done
$PY study/study.py "$STUDY"
