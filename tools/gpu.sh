#!/usr/bin/env bash
# Everything that only a GPU can show, in parts that take at most ten minutes on an 80 GB GPU:
#
#   bash tools/gpu.sh speed | updates | step | numerics | batches | larger | stages | flags | study
#
# Each figure is written to $OUT (default: gpu/) as soon as it is measured, so an interrupted part
# keeps what it has. LARGER is a folder with the config.json of the larger shape, such as
# Qwen2.5-VL-7B-Instruct/. SHAPE=tiny LARGER=tiny DEVICE=cpu tries the script on any machine;
# LIMIT is a part's seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu} device=${DEVICE:-cuda} shape=${SHAPE:-3b} limit=${LIMIT:-570}
mkdir -p "$out"

# limited COMMAND: runs it, and interrupts it (as Ctrl-C does) when the part's time is up.
limited() {
  local status=0
  timeout --signal INT --kill-after 20 "$((limit > SECONDS ? limit - SECONDS : 1))" "$@" ||
    status=$?
  if [ $status = 124 ]; then
    echo "gpu.sh: the part's $limit seconds are up; what it measured is in $out" >&2
    exit 124
  fi
  return $status
}

bench() {
  limited python -m tools.bench --device "$device" "$@"
}

# Loading, prefill and decoding of 64 rollouts, and the image pipeline, against transformers.
speed() {
  bench --shape "$shape" --repeats 2 --only load prefill decode images --out "$out/$shape"
}

# Forward and backward passes: of a group, prompt shared or repeated, and of unequal records.
updates() {
  bench --shape "$shape" --repeats 2 --only update sft --out "$out/${shape}_updates"
}

# A whole RFT step of both sides.
step() {
  bench --shape "$shape" --repeats 1 --only step --out "$out/${shape}_step"
}

# float32 against bfloat16, and sampled against scored log-probabilities.
numerics() {
  bench --shape "$shape" --only numerics --out "$out/${shape}_numerics"
}

# Decoding of 8 and of 256 rollouts.
batches() {
  bench --shape "$shape" --repeats 2 --only decode --prompts 1 --out "$out/${shape}_8"
  bench --shape "$shape" --repeats 1 --only decode --prompts 32 --out "$out/${shape}_256"
}

larger() {
  bench --shape "${LARGER:-Qwen2.5-VL-7B-Instruct}" --repeats 1 --only prefill decode --out "$out/larger"
}

# NCCL and FSDP2 with one process: both stages, then RFT resumed from its middle. The resumed run
# must give the same numbers.
stages() {
  stage_pair "$out/stages"
}

# The same with flags that change how a step is computed.
flags() {
  if [ "$device" = cuda ]; then
    stage_pair "$out/stages_flags" --cuda-graphs --deterministic
  else
    stage_pair "$out/stages_flags" --gradient-checkpointing
  fi
}

# stage_pair FOLDER [RFT FLAGS]
stage_pair() {
  local folder=$1
  shift
  local run="limited torchrun --standalone --nproc_per_node 1"
  local common="--device $device --max-new-tokens 180 --val 16"
  local rft="$run rft.py $common --init $folder/sft --steps 4 --every 2 --lr 1e-4"
  $run sft.py $common --init toy/base --out "$folder/sft" --steps "${STEPS:-200}" --every 100 \
    --lr 1e-3
  $rft --out "$folder/rft" "$@"
  # The copy loses its last two steps.
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

# Three arms of study/ablate.sh with longer RFT than two cores allow. A second call continues the
# first.
study() {
  limited env PY=python STUDY="$out/study" SEEDS=0 RFT="${STEPS:-1000}" \
    ARMS="cot-rft positional paper" bash study/ablate.sh ladder
}

case ${1:-} in
  speed | updates | step | numerics | batches | larger | stages | flags | study) "$1" ;;
  *)
    echo "gpu.sh: name a part: speed, updates, step, numerics, batches, larger, stages, flags" \
      "or study" >&2
    exit 2 ;;
esac
