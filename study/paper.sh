#!/usr/bin/env bash
# The paper's experiment on one data set, from a base checkpoint to one table:
#   reasoning by a teacher -> CoT-SFT -> RFT for 0.4 epoch -> scores in and out of domain.
# Stop it at any time: the same command resumes, and does not repeat what is finished.
#
#   INIT=Qwen2.5-VL-3B-Instruct TEACHER=http://localhost:8000/v1 MODEL=Qwen2.5-VL-72B-Instruct \
#     bash study/paper.sh dior
#
#   INIT      the base: a checkpoint folder in hub layout; it is scored as well
#   TEACHER   an OpenAI-compatible server (http://...) or a checkpoint folder that writes the
#             reasoning; without it, reasoning is written from the annotations
#   MODEL     the teacher's name on its server
#   COORDS    units of the teacher's boxes: resized, the default, pixels of the image as INIT's
#             processor resizes it, right for Qwen2.5-VL; 1000 for Qwen2-VL and Qwen3-VL; original
#   OUTSIDE   data sets for testing out of domain: NAME or NAME:SPLIT, several
#   ROOT      folder that has a folder for each data set, by its name (data)
#   GPUS      processes of torchrun on this machine (1)
#   OUT       output folder (ckpt/paper/NAME)
#   WANT SFT_FLAGS RFT_FLAGS EVAL_FLAGS COT_FLAGS       sizes, and more flags of the scripts
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

score_stages() {                             # output folder, data set, split
  score "$1" "$OUT/stages" --data "$2" --root "$ROOT/$2" --split "$3" ${EVAL_FLAGS:-}
}

# 1. Reasoning. The teacher sees the true box and explains how to find it. Answers that are
#    incomplete, wrong, in other coordinates, or give the box away are dropped.
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

# 4. Scores of base, CoT-SFT and RFT, in domain and out of domain.
[ -e "$OUT/stages/base" ] || ln -s "$(realpath "$INIT")" "$OUT/stages/base"
score_stages "$OUT/eval_$name" "$name" test
for other in ${OUTSIDE:-}; do
  split=test
  [[ $other == *:* ]] && split=${other#*:}
  score_stages "$OUT/eval_${other/:/_}" "${other%%:*}" "$split"
done

# 5. One table.
$PY study/paper.py "$OUT"
