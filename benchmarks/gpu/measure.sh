#!/usr/bin/env bash
# All GPU measurements, in calls of under ten minutes each:
#   bash benchmarks/gpu/measure.sh kernels    ceilings, every layer shape
#   bash benchmarks/gpu/measure.sh models     whole UNets, compiled on the spot; cold start
#   FILES=DIR bash benchmarks/gpu/measure.sh prepared    whole UNets from files made elsewhere (README.md), beside
#                                             torch.compile, which gets its time before anything is measured
# Each part has its own time limit and its own result file: a part that dies costs only itself.
# Results go to $OUT if it is set, else to benchmarks/results/<machine>/. DRY=1 runs tiny sizes on the CPU.
set -u
cd "$(dirname "$0")/../.."
part="${1:?kernels, models or prepared}"
results="${OUT:-benchmarks/results/$(hostname)}"
python="${PYTHON:-python3}"
mkdir -p "$results"
export PYTHONUNBUFFERED=1 PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD"
dry="${DRY:+--dry-run}"
log="$results/$part.log"
: >"$log"

# run SECONDS MODULE ARGUMENTS...: interrupted (SIGINT) at the limit, killed 10 s later
run() {
    local limit="$1" module="$2"
    shift 2
    echo "== $module $* (at most $limit s)" | tee -a "$log"
    timeout --signal=INT --kill-after=10 "$limit" "$python" -m "benchmarks.gpu.$module" "$@" >>"$log" 2>&1
    echo "== $module: exit code $?" | tee -a "$log"
}

case "$part" in
kernels)
    run 80 ceilings $dry --out "$results/ceilings.json"
    run 480 run $dry --models ddim-cifar10,sd15,ldm4-lsun,ldm4-imagenet,sdxl --batch 1,8 --seconds 430 --out "$results/shapes.json"
    ;;
models)
    kept="$(mktemp -d)"
    trap 'rm -rf "$kept"' EXIT
    cold="--model cifar10 --limit 45"
    [ -z "$dry" ] || cold="--model tiny --device cpu --ways ours,eager"
    run 165 end_to_end $dry --model cifar10 --batch 1,8 --kernels --keep "$kept/cifar10.qmod" --out "$results/cifar10.json"
    run 105 cold_start $cold --artifact "$kept/cifar10.qmod" --out "$results/cold_start.json"
    run 280 end_to_end $dry --model sd15 --batch 2 --kernels --out "$results/sd15.json"
    ;;
prepared)
    files="${FILES:?the folder of cifar10_w8.qmod, cifar10_w4.qmod, sd15_w8.qmod, sd15_w4.qmod}"
    export TORCHINDUCTOR_CACHE_DIR="$results/../inductor" TRITON_CACHE_DIR="$results/../triton"
    jobs="--job cifar10:1:max-autotune --job cifar10:8:max-autotune --job sd15:1:reduce-overhead"
    run 270 compiled_baselines $jobs --artifact "cifar10=$files/cifar10_w8.qmod" --artifact "sd15=$files/sd15_w8.qmod" --limit 260 --out "$results/compiled.json"
    run 70 end_to_end --model cifar10 --bits 8 --batch 1,8 --repeats 15 --ready "$results/compiled.json" --keep "$files/cifar10_w8.qmod" --out "$results/cifar10.json"
    run 90 end_to_end --model sd15 --bits 8 --batch 1,8 --repeats 10 --quick "CUDA graph fp16" --ready "$results/compiled.json" --keep "$files/sd15_w8.qmod" --out "$results/sd15.json"
    run 25 widths --w8 "$files/cifar10_w8.qmod" --w4 "$files/cifar10_w4.qmod" --batch 1,8,64 --out "$results/widths_cifar10.json"
    run 35 widths --w8 "$files/sd15_w8.qmod" --w4 "$files/sd15_w4.qmod" --rounds 8 --out "$results/widths_sd15.json"
    run 30 cold_start --ways ours --artifact "$files/cifar10_w8.qmod" --out "$results/cold_start.json"
    ;;
*)
    echo "unknown part $part: kernels, models or prepared" >&2
    exit 2
    ;;
esac
ls -l "$results"
