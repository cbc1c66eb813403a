#!/usr/bin/env bash
# All that only a GPU can show, in parts of ten minutes at most on one with 80 GB:
#
#   bash gpu.sh speed | updates | step | numerics | batches | larger | stages | flags | study
#
# Figures go to $OUT (default: gpu/), each when it is measured: a part that is cut off leaves what
# it has. SHAPE=tiny LARGER=tiny DEVICE=cpu tries the script on any machine; LIMIT is a part's
# seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu} device=${DEVICE:-cuda} shape=${SHAPE:-3b} limit=${LIMIT:-570}
mkdir -p "$out"

# limited COMMAND: stopped as by Ctrl-C where the part's time is over.
limited() {
  local status=0
  timeout --signal INT --kill-after 20 "$((limit > SECONDS ? limit - SECONDS : 1))" "$@" ||
    status=$?
  if [ $status = 124 ]; then
    echo "gpu.sh: the part's $limit seconds are over; what it has measured stands in $out" >&2
    exit 124
  fi
  return $status
}

bench() {
  limited python -m tools.bench --device "$device" "$@"
}

# Loading, prefill and decoding beside transformers at 64 rollouts, and the image pipeline.
speed() {
  bench --shape "$shape" --repeats 2 --only load prefill decode images --out "$out/$shape"
}

# Forward and backward passes: a group's, with the prompt once and repeated, and unequal records'.
updates() {
  bench --shape "$shape" --repeats 2 --only update sft --out "$out/${shape}_updates"
}

# A whole RFT step on either side.
step() {
  bench --shape "$shape" --repeats 1 --only step --out "$out/${shape}_step"
}

# float32 against bfloat16, graphs against eager; the ten largest operations.
numerics() {
  bench --shape "$shape" --only numerics profile --out "$out/${shape}_numerics"
}

# Decoding at 8 and at 256 rollouts.
batches() {
  bench --shape "$shape" --repeats 2 --only decode --prompts 1 --out "$out/${shape}_8"
  bench --shape "$shape" --repeats 1 --only decode --prompts 32 --out "$out/${shape}_256"
}

# The larger shape.
larger() {
  bench --shape "${LARGER:-7b}" --repeats 1 --only prefill decode --out "$out/larger"
}

# NCCL and FSDP2 with one process: both stages, then RFT again from the middle. What was resumed
# must be as what was never interrupted.
stages() {
  stage_pair "$out/stages"
}

# The same with the flags that change how a step is computed.
flags() {
  if [ "$device" = cuda ]; then
    stage_pair "$out/stages_flags" --cuda-graphs --deterministic
  else
    stage_pair "$out/stages_flags" --gradient-checkpointing
  fi
}

# stage_pair FOLDER FLAGS: FLAGS are RFT's.
stage_pair() {
  local folder=$1
  shift
  local run="limited torchrun --standalone --nproc_per_node 1"
  local common="--device $device --max-new-tokens 180 --val 16"
  local rft="$run rft.py $common --init $folder/sft --steps 4 --every 2 --lr 1e-4"
  $run sft.py $common --init toy/base --out "$folder/sft" --steps "${STEPS:-200}" --every 100 \
    --lr 1e-3
  $rft --out "$folder/rft" "$@"
  # The copy has lost its last two steps.
  cp -r "$folder/rft" "$folder/resumed"
  rm -r "$folder/resumed/step_000004"
  ln -sfn step_000002 "$folder/resumed/latest"
  $rft --out "$folder/resumed" --resume "$@"
  compare_logs "$folder/rft/metrics.jsonl" "$folder/resumed/metrics.jsonl"
}

compare_logs() {
  python - "$@" <<'PYTHON'
import json
import sys

whole, resumed = ([json.loads(line) for line in open(path)] for path in sys.argv[1:])
for a, b in zip(whole, resumed, strict=True):
    print(f"step {a['step']}: loss {a['loss']:.8f} resumed {b['loss']:.8f}, "
          f"gradient norm {a['grad_norm']:.6f} resumed {b['grad_norm']:.6f}, "
          f"sampled against scored {a['sampled_scored_max']:.1e}, peak {a['peak_GiB']:.2f} GiB")
PYTHON
}

# The regime of study/ablate.sh where the positional term matters most, for longer than two cores
# can. Called again it goes on where its time was over.
study() {
  limited env PY=python STUDY="$out/study" REGIMES=small SEEDS=0 RFT="${STEPS:-1000}" \
    ARMS="iou positional consistency" bash study/ablate.sh
}

case ${1:-} in
  speed | updates | step | numerics | batches | larger | stages | flags | study) "$1" ;;
  *)
    echo "gpu.sh: say which part: speed, updates, step, numerics, batches, larger, stages, flags" \
      "or study" >&2
    exit 2 ;;
esac
