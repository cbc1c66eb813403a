#!/usr/bin/env bash
# All that only a GPU can show, in four runs of ten minutes:
#
#   bash gpu.sh speed | batches | stages | study
#
# Figures go to $OUT (default: gpu/). SHAPE=tiny DEVICE=cpu tries the script on any machine.
set -euo pipefail
cd "$(dirname "$0")"
out=${OUT:-gpu} device=${DEVICE:-cuda} shape=${SHAPE:-3b}
mkdir -p "$out"

bench() {
  python bench.py --device "$device" "$@"
}

# Every part beside its peer at 64 rollouts; float32 against bfloat16, graphs against eager; the
# ten largest operations.
speed() {
  bench --shape "$shape" --out "$out/$shape"
}

# Decoding at 8 and at 256 rollouts, and the larger shape.
batches() {
  bench --shape "$shape" --only decode --prompts 1 --out "$out/${shape}_8"
  bench --shape "$shape" --only decode --prompts 32 --repeats 1 --out "$out/${shape}_256"
  bench --shape "${LARGER:-7b}" --only prefill decode --repeats 1 --out "$out/larger"
}

# NCCL and FSDP2 with one process: both stages, then RFT again from the middle. What was resumed
# must be as what was never interrupted.
stages() {
  stage_pair "$out/stages"
  if [ "$device" = cuda ]; then
    stage_pair "$out/stages_flags" --cuda-graphs --gradient-checkpointing
  else
    stage_pair "$out/stages_flags" --gradient-checkpointing
  fi
}

# stage_pair FOLDER FLAGS: FLAGS are RFT's.
stage_pair() {
  local folder=$1
  shift
  local run="torchrun --standalone --nproc_per_node 1"
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
# can.
study() {
  PY=python STUDY="$out/study" REGIMES=small SEEDS=0 RFT="${STEPS:-1000}" \
    ARMS="iou positional consistency" bash study/ablate.sh
}

case ${1:-} in
  speed | batches | stages | study) "$1" ;;
  *)
    echo "gpu.sh: say which part: speed, batches, stages or study" >&2
    exit 2 ;;
esac
