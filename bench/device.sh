#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, in sections that each end inside ten minutes.
#
#   bench/device.sh [OUTPUT [SECTION...]]      default: the sections of `all` below, in that order
#
# PYTHON names the interpreter (default python3); nothing is installed. Every section's log and the measurements lie in
# OUTPUT (default bench/results/<date>); a section that fails is reported at the end and the others run all the same.
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
output=${1:-bench/results/$(date -u +%Y-%m-%d)}
[ $# -eq 0 ] || shift
sections=("$@")
all=(build doctor wrappers test_layer_norm test_attention test_attention_decode test_feed_forward bench_layer_norm bench_attention bench_attention_decode bench_feed_forward overhead)
# Asked for by name alone: tune_attention tune_feed_forward, which print rows for the tile tables.
[ ${#sections[@]} -gt 0 ] || sections=("${all[@]}")
mkdir -p "$output"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

run_build() { "$PYTHON" -m llmkernels build; }
run_doctor() { "$PYTHON" -m llmkernels doctor; }
# What every instruction of the CUDA C++ kernels does on this GPU, against the manuals.
run_wrappers() {
  "$PYTHON" -m llmkernels doctor --wrappers --json >"$output/wrappers.json"
  "$PYTHON" -m llmkernels doctor --wrappers
}
# The tests of GPU code alone: packaging, lint and examples need no GPU and run elsewhere. Most of their time is Triton's
# compiler, so side by side where pytest-xdist is there; with -x what is red shows early.
processes=()
! "$PYTHON" -c 'import xdist' 2>/dev/null || processes=(-n 8)
test_files() { timeout 580 "$PYTHON" -m pytest -q -x "${processes[@]}" -k "not tiles" "$@"; }
run_test_layer_norm() { test_files tests/ops/test_layer_norm*.py tests/nn tests/test_dispatch.py; }
run_test_attention() { test_files tests/ops/test_attention.py tests/ops/test_attention_t*.py; }
run_test_attention_decode() { test_files tests/ops/test_attention_decode*.py; }
run_test_feed_forward() { test_files tests/ops/test_feed_forward*.py; }
# One op in both kinds of arithmetic; the second runs even if a provider of the first does not match.
bench_op() {
  local failed=0
  for dtype in bfloat16 float32; do
    timeout 280 "$PYTHON" -m bench --op "$1" --device cuda --dtype "$dtype" --output "$output" || failed=1
  done
  return $failed
}
run_bench_layer_norm() { bench_op layer_norm; }
run_bench_attention() { bench_op attention; }
run_bench_attention_decode() { bench_op attention_decode; }
run_bench_feed_forward() { bench_op feed_forward; }
run_tune_attention() { "$PYTHON" -m bench.tune_attention --seconds 480; }
run_tune_feed_forward() { "$PYTHON" -m bench.tune_feed_forward --seconds 480; }
run_overhead() {
  "$PYTHON" -m pytest bench/test_host_overhead.py -q --benchmark-json="$output/host_overhead.json"
}

failed=()
for section in "${sections[@]}"; do
  echo "== $section"
  start=$SECONDS
  "run_$section" 2>&1 | tee "$output/$section.log"
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$section")
  echo "== $section took $((SECONDS - start)) s"
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
echo "all sections passed; results in $output"
