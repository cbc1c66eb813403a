#!/usr/bin/env bash
# The study: what the two terms give on the embedded world, beside their controls, in several regimes and for several seeds. Hours on two cores.
# It can be stopped at any time and run again: what is finished stands, what was stopped goes on. toy/study.py writes the tables and the figure.
#   REGIMES="small" SEEDS="0" RFT=20 TEST=40 bash ablate.sh       a quick look
set -euo pipefail
cd "$(dirname "$0")"
export GOMP_SPINCOUNT=10000
PY=${PY:-.venv/bin/python}
STUDY=${STUDY:-ckpt/study}
REGIMES=${REGIMES:-small wide little}       # objects of half the length; the world as it is; SFT on a tenth of its records
SEEDS=${SEEDS:-0 1 2}
SFT=${SFT:-900} RFT=${RFT:-300} TEST=${TEST:-1000}
ARMS=${ARMS:-iou positional coherent focus shuffled boxes}
TOKENS="--max-new-tokens 220"

train() {                                    # folder, then the command; --resume where it was stopped
  [ -e "$1/done" ] && return
  local out=$1 go=""; shift
  if [ -e "$out/latest" ]; then go=--resume; else rm -rf "$out"; fi
  $PY "$@" --out "$out" $go
  touch "$out/done"
}

score() {                                    # folder, data, split, then flags; one folder of scores for each of them
  local out="$1/eval_$3${5:+_T$5}"
  [ -e "$out/report.html" ] && return
  $PY eval.py "$1" --data "$2" --split "$3" --limit $TEST $TOKENS --batch 125 --out "$out" ${4:-} ${5:-}
}

for seed in $SEEDS; do
  for regime in $REGIMES; do
    case $regime in small) learn=synth data=synth-small;; wide) learn=synth data=synth;; little) learn=synth:0.1 data=synth;; esac
    here=$STUDY/$regime/$seed
    sft=$STUDY/sft_${learn/:/_}/$seed
    train $sft sft.py --data $learn --init toy/base --steps $SFT --batch 16 --lr 1.5e-3 --every 300 $TOKENS --seed $seed
    mkdir -p $here && ln -sfn ../../sft_${learn/:/_}/$seed $here/sft
    for arm in sft $ARMS; do
      rft="rft.py --data $data --init $sft --steps $RFT --prompts 16 --lr 1e-4 --every 100 --micro-tokens 16384 $TOKENS --seed $seed"
      case $arm in
        sft) ;;
        iou) train $here/$arm $rft --weights 1 0 0.5 --weighting off;;
        positional) train $here/$arm $rft --weighting off;;
        coherent | focus | shuffled) train $here/$arm $rft --weighting $arm;;
        boxes) train $here/$arm sft.py --data $data --split rft --answer-only --init $sft --steps $RFT --batch 16 --lr 1e-4 --every 100 \
          $TOKENS --seed $seed;;
      esac
      score $here/$arm $data test
      score $here/$arm $data test --temperature 1
      [ $regime = wide ] && score $here/$arm synth novel
      if [ $arm = sft ]; then for t in 0.8 0.6; do score $here/$arm $data test --temperature $t; done; fi
    done
  done
done
$PY toy/study.py $STUDY
