#!/usr/bin/env bash
# Check what needs GPUs: every way of launching gives the losses of one process, a run goes on by another way, the GPU
# kernels agree with plain PyTorch, bf16 with fp32, and a seed gives the same bytes on all devices of a type. The
# networks have Mamba-2 backbones. A few minutes; writes to runs/check_gpu (RUNS).
#
#   scripts/check_gpu.sh [CHECK …]     all checks, or some of them
#   scripts/check_gpu.sh --list        their names
#   DEVICE=cpu scripts/check_gpu.sh    what of them a machine without a GPU can show
#
# A check that cannot be made says why, and is named at the end. Without a GPU (and DEVICE=cpu) nothing is checked.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
device=${DEVICE:-cuda}
runs=${RUNS:-runs/check_gpu}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

checks=(
  one_process ddp deepspeed_zero2 deepspeed_zero3 fsdp2 compiled bf16_training
  mamba2 mamba2_fused unet bf16 generate_bytes two_process_bytes kernel_tests
)
if [ "${1:-}" = --list ]; then
  printf '%s\n' "${checks[@]}"
  exit 0
fi

one=single_gpu
two=2
if [ "$device" = cpu ]; then
  one=cpu
  export CUDA_VISIBLE_DEVICES=
else
  gpus=$("$bin/python" -c "import torch; print(torch.cuda.device_count())")
  if [ "$gpus" = 0 ]; then
    echo "no CUDA device"
    exit 0
  fi
  two=$((gpus > 1 ? 2 : 1))
  "$bin/python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.device_count(), 'GPUs')"
fi

settings=(
  configs/digits.yaml --set zoo="$runs/zoo" --set task.runs=2 --set task.train_steps=50 --set task.steps=8
  --set model.backbone.kind=mamba2 --set model.backbone.d_model=128 --set model.backbone.d_state=64
  --set model.backbone.headdim=32
  --set train.precision=fp32 --set train.log_every=1 --set train.save_every=20 --set train.steps=40
)

leave_out() { # reason
  echo "$1"
  exit 3
}

compare() { # check, more arguments
  "$bin/python" scripts/gpu_checks.py "$1" --device "$device" --runs "$runs" "${@:2}"
}

on_device() { # test
  DEVICE="$device" "$bin/python" -m pytest -q "tests/test_device.py::$1"
}

start() { # way, processes, command, more arguments; its log is named as the way
  local spread=()
  if [ "$device" = cpu ] && [ "$1" != cpu ] && [[ "$1" != deepspeed_* ]]; then spread=(ACCELERATE_USE_CPU=true); fi
  env "${spread[@]}" "$bin/accelerate-launch" --config_file "configs/accelerate/$1.yaml" --num_processes "$2" "${@:3}" \
    > "$runs/$1.log" 2>&1 || { tail -30 "$runs/$1.log"; exit 1; }
  grep -h "Mamba-2 layers" "$runs/$1.log" || true
}

launch() { # way, processes, run, more arguments
  start "$1" "$2" -m rpg train "${settings[@]}" --set run="$runs/$3" "${@:4}"
}

spread() { # way, processes: the whole run, and the second half once more from the first half of one process
  if [[ "$1" = deepspeed_* ]] && ! "$bin/python" -c "import deepspeed" 2> /dev/null; then
    leave_out "deepspeed is not installed"
  fi
  launch "$1" "$2" "$1"
  compare losses --run "$1"
  rm -rf "$runs/$1-resumed"
  cp -r "$runs/one_process" "$runs/$1-resumed"
  rm -r "$runs/$1-resumed/checkpoints/step-00000040" "$runs/$1-resumed/generator"
  launch "$1" "$2" "$1-resumed" --resume
  compare losses --run "$1-resumed"
}

check_one_process() { compare losses --run one_process; }
check_ddp() {
  [ "$two" = 2 ] || leave_out "needs 2 GPUs"
  spread ddp 2
}
check_deepspeed_zero2() { spread deepspeed_zero2 "$two"; }
check_deepspeed_zero3() { spread deepspeed_zero3 "$two"; }
check_fsdp2() { spread fsdp2 "$two"; }
check_compiled() {
  launch "$one" 1 compiled --set train.compile=inductor
  compare losses --run compiled
}
check_bf16_training() {
  launch "$one" 1 bf16_training --set train.precision=bf16
  compare losses --run bf16_training --tolerance 0.1
}
check_mamba2() { on_device test_mamba2; }
check_mamba2_fused() {
  [ "$device" = cuda ] && "$bin/python" -c "import mamba_ssm" 2> /dev/null || leave_out "needs a GPU and mamba-ssm"
  on_device test_mamba2_fused
}
check_unet() { on_device test_unet; }
check_bf16() { on_device test_bf16; }
check_generate_bytes() { compare generate_bytes; }
check_two_process_bytes() {
  [ "$two" = 2 ] || leave_out "needs 2 GPUs"
  start "$one" 1 -m rpg generate "$runs/one_process" -n 3 --output "$runs/generated/one"
  start ddp 2 -m rpg generate "$runs/one_process" -n 3 --output "$runs/generated/two"
  diff -r "$runs/generated/one" "$runs/generated/two"
}
check_kernel_tests() {
  "$bin/python" -m pytest -q tests/rpg/models/test_mamba2.py tests/rpg/models/test_backbone.py \
    tests/rpg/models/test_denoiser.py tests/rpg/models/test_unet1d.py
}

rm -rf "$runs"
mkdir -p "$runs"
"$bin/rpg" collect "${settings[@]}"
launch "$one" 1 one_process

[ "$#" -gt 0 ] || set -- "${checks[@]}"
left_out=()
for check in "$@"; do
  status=0
  echo "--- $check"
  (set -e; "check_$check") &  # not in a condition, which would let it go on after an error
  wait $! || status=$?
  case "$status" in
    0) echo "$check: right" ;;
    3) left_out+=("$check") ;;
    *) echo "$check: WRONG"; exit 1 ;;
  esac
done
echo "$(($# - ${#left_out[@]})) of ${#checks[@]} checks are right; left out: ${left_out[*]:-none}"
