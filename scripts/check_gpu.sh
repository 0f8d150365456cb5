#!/usr/bin/env bash
# Check what needs GPUs: every way of launching gives the losses of one process, a run goes on by another way, and the
# GPU kernels agree with plain PyTorch. Prints 'no CUDA device' and exits 0 elsewhere. A few minutes; writes to
# runs/check_gpu. Ways that need two GPUs are named and left out where there is one.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
gpus=$("$bin/python" -c "import torch; print(torch.cuda.device_count())")
if [ "$gpus" = 0 ]; then
  echo "no CUDA device"
  exit 0
fi
"$bin/python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.device_count(), 'GPUs')"
two=$((gpus > 1 ? 2 : 1))
runs=runs/check_gpu
rm -rf "$runs"
mkdir -p "$runs"

settings=(configs/digits.yaml --set train.precision=fp32 --set train.log_every=1 --set train.save_every=20)
"$bin/rpg" collect configs/digits.yaml

launch() { # way, processes, run, more arguments
  "$bin/accelerate-launch" --config_file "configs/accelerate/$1.yaml" --num_processes "$2" \
    scripts/train.py "${settings[@]}" --set run="$runs/$3" "${@:4}" > "$runs/$3.log" 2>&1 \
    || { tail -30 "$runs/$3.log"; echo "$1 failed"; exit 1; }
}

compare() { # run: its losses and its weights against those of the run single_gpu
  "$bin/python" - "$runs" "$1" <<'PY'
import json, sys
from pathlib import Path
from rpg.generation.generator import Generator

folder, run = Path(sys.argv[1]), sys.argv[2]
one, other = ([json.loads(line)["loss"] for line in open(folder / name / "metrics.jsonl")] for name in ("single_gpu", run))
worst = max(abs(a - b) for a, b in zip(one, other, strict=True))
Generator.from_pretrained(folder / run, "cuda").generate(1)
print(f"{run}: {len(other)} steps, losses of one process to {worst:.1e}")
assert worst < 1e-3, "GPU sums of another order differ by less"
PY
}

launch single_gpu 1 single_gpu --set train.steps=40
compare single_gpu
for way in ddp deepspeed_zero2 deepspeed_zero3 fsdp2; do
  case "$way-$two" in
    ddp-1) echo "ddp: needs 2 GPUs"; continue ;;
    deepspeed_*) "$bin/python" -c "import deepspeed" 2> /dev/null || { echo "$way: deepspeed is not installed"; continue; } ;;
  esac
  launch "$way" "$two" "$way" --set train.steps=40
  compare "$way"
  # The second half once more, from the first half of the plain run.
  cp -r "$runs/single_gpu" "$runs/$way-resumed"
  rm -r "$runs/$way-resumed/checkpoints/step-00000040" "$runs/$way-resumed/generator"
  launch "$way" "$two" "$way-resumed" --set train.steps=40 --resume
  compare "$way-resumed"
done

launch single_gpu 1 compiled --set train.steps=40 --set train.compile=inductor
compare compiled
"$bin/python" -m pytest -q tests/rpg/models/test_mamba2.py tests/rpg/models/test_backbone.py tests/rpg/models/test_denoiser.py
echo "all that could be checked is right"
