#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, in sections that can each be run alone and end inside ten minutes.
#
#   bench/device.sh [OUTPUT [SECTION...]]      default: the sections of `all` below, in that order
#
# It needs no network and installs nothing but what bench/peers.sh has packed, and that into build/ alone. PYTHON names
# the interpreter (default python3: one with torch and triton), PEERS the folder of peers.sh (default build/peers). Logs,
# measurements and plots lie in OUTPUT (default bench/results/<date>), the built module too unless it is a part of the
# checkout. A section that fails is named at the end; the others run all the same.
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
PEERS=${PEERS:-build/peers}
output=${1:-bench/results/$(date -u +%Y-%m-%d)}
[ $# -eq 0 ] || shift
sections=("$@")
ops=(layer_norm attention attention_varlen attention_decode feed_forward)
models=(encoder_layer sentence_encoder language_model generation)
all=(build wrappers doctor)
for op in layer_norm attention attention_decode feed_forward; do all+=("test_$op"); done
all+=(test_nn test_replacement test_bench peers)
for op in "${ops[@]}" "${models[@]}"; do all+=("bench_$op"); done
all+=(overhead report)
# Asked for by name alone: bench_<op>_float32 and bench_<op>_float16, the same in other arithmetic; tune_<op>, which
# prints rows for the tile tables.
[ ${#sections[@]} -gt 0 ] || sections=("${all[@]}")
mkdir -p "$output"
installed=$PWD/build/peers-installed
export PYTHONPATH=$PWD:$installed PYTHONUNBUFFERED=1
limit=590

python() { timeout "$limit" "$PYTHON" "$@"; }
run_build() { python -m llmkernels build; }
# What every instruction of the CUDA C++ kernels does on this GPU, against the manuals.
run_wrappers() {
  python -m llmkernels doctor --wrappers --json >"$output/wrappers.json"
  python -m llmkernels doctor --wrappers
}
run_doctor() { python -m llmkernels doctor; }
# Most of their time is Triton's compiler, so side by side where pytest-xdist is there; with -x what is red shows early.
processes=()
! "$PYTHON" -c 'import xdist' 2>/dev/null || processes=(-n 8)
test_files() { python -m pytest -q -x ${processes[@]+"${processes[@]}"} -k "not tiles" "$@"; }
run_test_layer_norm() { test_files tests/ops/test_layer_norm*.py tests/test_dispatch.py; }
run_test_attention() { test_files tests/ops/test_attention.py tests/ops/test_attention_[ct]*.py; }
run_test_attention_decode() { test_files tests/ops/test_attention_decode*.py; }
run_test_feed_forward() { test_files tests/ops/test_feed_forward*.py; }
run_test_nn() { test_files tests/nn; }
run_test_replacement() { test_files tests/replacement; }
run_test_bench() { test_files tests/bench; }
# What peers.sh has packed; what of it does not fit this machine's Python or torch, the benchmarks name.
run_peers() {
  if ! compgen -G "$PEERS/*.whl" >/dev/null; then
    echo "no wheels in $PEERS: no peers beside torch's own kernels (bench/peers.sh packs them)"
    return 0
  fi
  local wheel
  for wheel in "$PEERS"/*.whl; do
    python -m pip install --quiet --no-index --no-deps --upgrade --target "$installed" "$wheel" || echo "passed over: $wheel"
  done
}
# No case is begun later than 420 s, so that the last one and the plots have their time.
bench_op() { python -m bench "$1" --device cuda --dtype "$2" --seconds 420 --save "$output"; }
run_overhead() { python -m pytest bench/test_host_overhead.py -q --benchmark-json="$output/host_overhead.json"; }
run_report() { python -m bench.report --results "$output" --check --readme bench/README.md || true; }

run_section() {
  case $1 in
    bench_*_float32) section=${1%_float32} && bench_op "${section#bench_}" float32 ;;
    bench_*_float16) section=${1%_float16} && bench_op "${section#bench_}" float16 ;;
    bench_*) bench_op "${1#bench_}" bfloat16 ;;
    tune_*) python -m "bench.$1" --seconds 480 ;;
    *) "run_$1" ;;
  esac
}

failed=()
for name in "${sections[@]}"; do
  echo "== $name"
  start=$SECONDS
  run_section "$name" 2>&1 | tee "$output/$name.log"
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$name")
  echo "== $name took $((SECONDS - start)) s"
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
echo "all sections passed; results in $output"
