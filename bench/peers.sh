#!/usr/bin/env bash
# Packs wheels of the peers for a machine without a network, where bench/device.sh's section `peers` installs them.
#
#   bench/peers.sh [FOLDER [PACKAGE...]]      default: build/peers, the packages below
#
# PYTHON_VERSION (default 3.12) and PLATFORMS say what that machine runs. What a peer requires is packed with it, but for
# what the machine has: torch and what that requires, triton, CUDA's libraries. flash-attn 2 is published as source alone: where nvcc and
# torch are, `pip wheel --no-build-isolation --no-deps flash-attn` makes its wheel, which may be put into FOLDER.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PYTHON_VERSION=${PYTHON_VERSION:-3.12}
PLATFORMS=${PLATFORMS:-manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 linux_x86_64}
folder=${1:-build/peers}
[ $# -eq 0 ] || shift
packages=("$@")
[ ${#packages[@]} -gt 0 ] || packages=(liger-kernel quack-kernels flash-attn-4 xformers)
mkdir -p "$folder"

target=(--only-binary=:all: --python-version "$PYTHON_VERSION" --implementation cp --abi "cp${PYTHON_VERSION/./}" --abi abi3 --abi none)
for platform in $PLATFORMS; do target+=(--platform "$platform"); done

# name==version of all that a package needs, without what the machine has.
requirements() {
  "$PYTHON" -m pip install --quiet --dry-run --ignore-installed --report - "${target[@]}" --target "$folder/none" "$1" |
    "$PYTHON" -c '
import json, re, sys
own = "filelock|fsspec|jinja2|markupsafe|mpmath|networkx|numpy|setuptools|sympy|typing-extensions"
present = re.compile(own + r"|torch|triton|cuda-(toolkit|bindings|pathfinder)|nvidia-(?!cutlass).*")
for item in json.load(sys.stdin)["install"]:
    metadata = item["metadata"]
    name = re.sub(r"[-_.]+", "-", metadata["name"]).lower()
    if not present.fullmatch(name):
        print(name + "==" + metadata["version"])
'
}

failed=()
for package in "${packages[@]}"; do
  echo "== $package"
  if wanted=$(requirements "$package") && [ -n "$wanted" ] &&
    xargs "$PYTHON" -m pip download --quiet --no-deps "${target[@]}" --dest "$folder" <<<"$wanted"; then
    echo "$wanted"
  else
    failed+=("$package")
  fi
done
du -ch "$folder"/*.whl | tail -n 1
[ ${#failed[@]} -eq 0 ] || { echo "not packed: ${failed[*]}"; exit 1; }
