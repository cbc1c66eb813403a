#!/usr/bin/env bash
# The paper's experiment on one data set, from a base checkpoint to one table:
#   reasoning by a teacher -> CoT-SFT -> RFT for 0.4 epoch -> scores in and out of domain.
# It can be stopped at any time and started again: what is finished stands, the rest goes on.
#
#   INIT=Qwen2.5-VL-3B-Instruct TEACHER=http://localhost:8000/v1 MODEL=Qwen2.5-VL-72B-Instruct \
#     bash study/paper.sh dior
#
#   INIT      the base: a checkpoint folder in hub layout; it is scored, too
#   TEACHER   an OpenAI-compatible server (http://...) or a checkpoint folder that writes the
#             reasoning; without one, it is written from the annotations
#   MODEL     the teacher's name on its server
#   COORDS    in which it gives boxes (resized: pixels of the image as INIT's processor resizes
#             it, right for Qwen2.5-VL; 1000 for Qwen2-VL and Qwen3-VL; original)
#   OUTSIDE   data sets to test on that nothing was trained on; NAME or NAME:SPLIT, many
#   ROOT      the folder that holds the data sets, each in a folder of its name (data)
#   GPUS      processes of torchrun on this machine (1)
#   OUT       where everything goes (ckpt/paper/NAME)
#   WANT SFT_FLAGS RFT_FLAGS EVAL_FLAGS COT_FLAGS       sizes, and flags of each script
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:-}
if [ -z "$name" ] || [ -z "${INIT:-}" ]; then
  echo "paper.sh: no data set or no INIT; INIT=CHECKPOINT bash study/paper.sh dior" >&2
  exit 2
fi
ROOT=${ROOT:-data}
OUT=${OUT:-ckpt/paper/$name}
PY=${PY:-.venv/bin/python}
RUN="$PY"
[ "${GPUS:-1}" = 1 ] || RUN="$PY -m torch.distributed.run --standalone --nproc_per_node $GPUS"
mkdir -p "$OUT"

. study/once.sh

score_stages() {                             # folder of scores, data set, split
  score "$1" "$OUT/stages" --data "$2" --root "$ROOT/$2" --split "$3" ${EVAL_FLAGS:-}
}

# 1. Reasoning. The teacher is told the true box and explains how one finds it; what is
#    incomplete, in other coordinates, wrong, or gives the box away is dropped.
cot=""
if [ -n "${TEACHER:-}" ]; then
  cot="--cot $OUT/cot.jsonl"
  server=()
  case $TEACHER in
    http*) server=(--model "${MODEL:-}" --coords "${COORDS:-resized}" --init "$INIT") ;;
  esac
  if [ ! -e "$OUT/cot.done" ]; then
    $PY cot.py "$name" --root "$ROOT/$name" --teacher "$TEACHER" "${server[@]}" \
      --want "${WANT:-30000}" --out "$OUT/cot.jsonl" ${COT_FLAGS:-}
    touch "$OUT/cot.done"
  fi
fi

# 2. CoT-SFT from the base.  3. RFT from CoT-SFT, on boxes alone.
data="--data $name --root $ROOT/$name"
train "$OUT/stages/sft" sft.py $data --init "$INIT" $cot ${SFT_FLAGS:---epochs 1}
train "$OUT/stages/rft" rft.py $data --init "$OUT/stages/sft" ${RFT_FLAGS:---epochs 0.4}

# 4. Scores of base, CoT-SFT and RFT, in domain and outside of it.
[ -e "$OUT/stages/base" ] || ln -s "$(realpath "$INIT")" "$OUT/stages/base"
score_stages "$OUT/eval_$name" "$name" test
for other in ${OUTSIDE:-}; do
  split=test
  [[ $other == *:* ]] && split=${other#*:}
  score_stages "$OUT/eval_${other/:/_}" "${other%%:*}" "$split"
done

# 5. One table.
$PY study/paper.py "$OUT"
