#!/usr/bin/env bash
# The study: the paper's four ablations on the embedded world (CoT-SFT, reward, weight, stability), beside their controls, in several
# regimes and for several seeds. Hours on two cores.
# It can be stopped at any time and run again: what is finished stands, what was stopped goes on. study/study.py writes the tables and the figure.
#   STUDY=ckpt/look REGIMES=little SEEDS=0 RFT=20 TEST=40 bash study/ablate.sh        a quick look
#   ARMS=own OWN="--alpha 10" bash study/ablate.sh                                    a variant of yours beside them; a study has one of them
#   OMP_NUM_THREADS=1 SEEDS=0 taskset -c 0 bash study/ablate.sh                       one core for a seed, another one beside it
set -euo pipefail
cd "$(dirname "$0")/.."
export GOMP_SPINCOUNT=10000
PY=${PY:-.venv/bin/python}
STUDY=${STUDY:-ckpt/study}
REGIMES=${REGIMES:-little small wide}       # SFT on a tenth of its records, then RFT on the world as it is; or with things half as long; SFT on all
SEEDS=${SEEDS:-0 1 2}
RFT=${RFT:-120} TEST=${TEST:-1000}
# does CoT-SFT matter: base direct (sft) iou consistency boxes; which reward: iou giou diou center positional; which weight: positional (off)
# mean variance consistency shuffled; stability: iou and consistency for twice the steps.
ARMS=${ARMS:-base direct iou giou diou center positional mean variance consistency shuffled boxes longer consistency-longer}
TOKENS="--max-new-tokens 160"

train() {                                    # folder, then the command; --resume where it was stopped
  [ -e "$1/done" ] && return
  local out=$1 go=""; shift
  if [ -e "$out/latest" ]; then go=--resume; else rm -rf "$out"; fi
  $PY "$@" --out "$out" $go
  touch "$out/done"
}

score() {                                    # model, data, split, temperature (default: greedy); a folder of scores for each
  local out="$here/$arm/eval_$3${4:+_T$4}"
  [ -e "$out/report.html" ] && return
  $PY eval.py "$1" --data "$2" --split "$3" --temperature "${4:-0}" --limit $TEST $TOKENS --batch 125 --out "$out"
}

for seed in $SEEDS; do
  for regime in $REGIMES; do
    # Without the division by std a group that misses altogether, which the positional term alone tells apart, moves next to nothing: where such
    # groups are the question it stays on.
    case $regime in
      little) learn=synth:0.1 steps=300 data=synth std=--no-std;;
      small) learn=synth:0.1 steps=300 data=synth-small std=;;
      wide) learn=synth steps=1000 data=synth std=--no-std;;
      *) echo "ablate.sh: no regime $regime; there are little, small, wide" >&2; exit 2;;
    esac
    here=$STUDY/$regime/$seed
    sft=$STUDY/sft_${learn/:/_}/$seed
    train $sft sft.py --data $learn --init toy/base --steps $steps --batch 16 --lr 1.5e-3 --freeze-vision --every $steps $TOKENS --seed $seed
    for arm in sft $ARMS; do
      common="rft.py --data $data --prompts 32 --temperature 0.6 $std --lr 2e-4 --beta 0 --freeze-vision --every 40 --micro-tokens 16384
              $TOKENS --seed $seed"
      rft="$common --init $sft --steps $RFT"
      model=$here/$arm
      case $arm in
        sft) model=$sft;;
        base) model=toy/base;;
        direct) train $model $common --init toy/base --steps $RFT --reward iou=1 format=1 --weighting off;;
        iou) train $model $rft --reward iou=1 format=1 --weighting off;;
        giou | diou | center | positional) train $model $rft --reward iou=1 $arm=0.1 format=1 --weighting off;;
        mean | variance | consistency | shuffled) train $model $rft --weighting $arm;;
        longer) train $model $common --init $sft --steps $((2 * RFT)) --reward iou=1 format=1 --weighting off;;
        consistency-longer) train $model $common --init $sft --steps $((2 * RFT));;
        own) train $model $rft --weighting off ${OWN:?says what your variant changes, as flags of rft.py};;
        # As long as RFT takes: one of its steps of 256 rollouts, made and learned from, costs what ten of 32 answers cost.
        boxes) train $model sft.py --data $data --split rft --answer-only --init $sft --steps $((10 * RFT)) --batch 32 --lr 5e-4 \
          --freeze-vision --every $((10 * RFT)) $TOKENS --seed $seed;;
        *) echo "ablate.sh: no arm $arm; there are base, direct, iou, giou, diou, center, positional, mean, variance," \
             "consistency, shuffled, boxes, longer, consistency-longer, own" >&2; exit 2;;
      esac
      score $model $data test
      score $model $data test 1
      if [ $data = synth ]; then score $model synth novel; fi
      if [ $arm = sft ]; then score $model $data test 0.8; score $model $data test 0.6; fi
    done
  done
done
$PY study/study.py $STUDY
