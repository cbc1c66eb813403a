#!/usr/bin/env bash
# All that only a GPU can show, in four runs of ten minutes: gpu.sh speed | batches | stages | study. Figures go to $OUT (default gpu/).
# SHAPE=tiny DEVICE=cpu tries the script itself on any machine.
set -euo pipefail
cd "$(dirname "$0")"
out=${OUT:-gpu} device=${DEVICE:-cuda} shape=${SHAPE:-3b}
mkdir -p "$out"
case ${1:-} in
speed)      # every part beside its peer at 64 rollouts; float32 against bfloat16, graphs against eager; the ten largest operations
    python bench.py --device "$device" --shape "$shape" --out "$out/$shape" ;;
batches)    # decoding at 8 and 256 rollouts; the larger shape
    python bench.py --device "$device" --shape "$shape" --only decode --prompts 1 --out "$out/${shape}_8"
    python bench.py --device "$device" --shape "$shape" --only decode --prompts 32 --repeats 1 --out "$out/${shape}_256"
    python bench.py --device "$device" --shape "${LARGER:-7b}" --only prefill decode --repeats 1 --out "$out/larger" ;;
stages)     # NCCL and FSDP2 with one process: train, stop, resume; resumed must be as never interrupted
    run="torchrun --standalone --nproc_per_node 1"
    for more in "" "--cuda-graphs --gradient-checkpointing"; do
        [ "$device" = cuda ] || more=${more/--cuda-graphs/}
        stage="$out/stages${more:+_flags}"
        $run sft.py --device "$device" --init toy/base --out "$stage/sft" --steps "${STEPS:-200}" --every 100 --lr 1e-3 --max-new-tokens 180 --val 16
        $run rft.py --device "$device" --init "$stage/sft" --out "$stage/rft" --steps 4 --every 2 --lr 1e-4 --max-new-tokens 180 --val 16 $more
        cp -r "$stage/rft" "$stage/resumed"
        rm -r "$stage/resumed/step_000004" && ln -sfn step_000002 "$stage/resumed/latest"
        $run rft.py --device "$device" --init "$stage/sft" --out "$stage/resumed" --steps 4 --every 2 --lr 1e-4 --max-new-tokens 180 \
            --val 16 --resume $more
        python - "$stage" <<'PYTHON'
import json, sys
whole, resumed = ([json.loads(line) for line in open(f"{sys.argv[1]}/{name}/metrics.jsonl")] for name in ("rft", "resumed"))
for a, b in zip(whole, resumed, strict=True):
    print(f"step {a['step']}: loss {a['loss']:.8f} resumed {b['loss']:.8f}, gradient norm {a['grad_norm']:.6f} resumed {b['grad_norm']:.6f}, "
          f"sampled against scored {a['sampled_scored_max']:.1e}, peak {a['peak_GiB']:.2f} GiB")
PYTHON
    done ;;
study)      # the main regime of study/ablate.sh for longer than two cores can
    PY=python STUDY="$out/study" REGIMES=small SEEDS=0 RFT="${STEPS:-1000}" ARMS="iou positional consistency" bash study/ablate.sh ;;
*)  echo "gpu.sh: say which part: speed, batches, stages or study" >&2; exit 2 ;;
esac
