#!/usr/bin/env bash
# Builds, tests and measures everything on a machine with a GPU, inside ten minutes.
#
#   bench/device.sh [OUTPUT [SECTION...]]      sections: build doctor test bench overhead; default: all, in this order
#
# PYTHON names the interpreter (default python3); nothing is installed. Every section's log and the measurements lie in
# OUTPUT (default bench/results/<date>); a section that fails is reported at the end and the others run all the same.
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
output=${1:-bench/results/$(date -u +%Y-%m-%d)}
[ $# -eq 0 ] || shift
sections=("$@")
[ ${#sections[@]} -gt 0 ] || sections=(build doctor test bench overhead)
mkdir -p "$output"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

run_build() { "$PYTHON" -m llmkernels build; }
run_doctor() { "$PYTHON" -m llmkernels doctor; }
# The tests of GPU code alone: packaging, lint and examples need no GPU and run elsewhere.
run_test() { timeout 300 "$PYTHON" -m pytest tests/ops tests/nn tests/test_dispatch.py -q -x -k "not tiles"; }
run_bench() {
  for dtype in bfloat16 float32; do
    timeout 200 "$PYTHON" -m bench --device cuda --dtype "$dtype" --output "$output" || return 1
  done
}
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
