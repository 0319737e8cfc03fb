#!/usr/bin/env bash
# Everything worth measuring on a GPU, in one call: bench/gpu.sh OUT [DEVICE]
# Tests come first; then one JSON file a benchmark in OUT, and a log beside it. A step that fails is
# named at the end and does not keep the others from running. PYTHON is the interpreter to use; it
# imports classlens.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
device=${2:-cuda}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."
failed=()

step() { # NAME COMMAND…: standard output to NAME.json, the rest to NAME.log
  local name=$1
  shift
  echo "== $name"
  "$@" >"$out/$name.json" 2>"$out/$name.log" || failed+=("$name")
}
bench() { "$python" -c 'from classlens.cli import main; main()' bench "$@" --device "$device" --json; }

nvidia-smi >"$out/nvidia-smi.log" 2>&1 || true
step tests "$python" -m pytest -q -p no:cacheprovider tests/kernels -m "not slow"
for model in B/32 B/16 L/16; do
  step "kernels-${model/\//}" bench kernels --model "$model" --classes 10 --classes 1000 --classes 21841
done
step kernels-dtypes bench kernels --dtype float16 --dtype bfloat16 --dtype float32
step certify bench certify --compile
step fidelity bench fidelity
for model in vit_base_patch32_224 vit_base_patch16_224 vit_large_patch16_224; do
  step "extract-$model" bench extract --model "$model" --images "${IMAGES:-8192}"
done
step extract-certify bench extract --certify --images "${IMAGES:-2048}"
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}; see $out/*.log" >&2; exit 1; }
