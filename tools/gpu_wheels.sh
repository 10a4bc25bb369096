#!/usr/bin/env bash
# Fetches what `python -m pipelines.bench.gpu` needs beside torch, torchvision, timm, torchmetrics, triton,
# psutil, Pillow and matplotlib, for a GPU machine without a network: about 6 MB of wheels.
#
#   tools/gpu_wheels.sh [FOLDER] [PYTHON_VERSION]
#
# There: pip install --no-deps --no-index FOLDER/*.whl
set -euo pipefail
folder=${1:-runs/gpu-wheels} version=${2:-3.12}
constraints=$(dirname "$0")/../constraints.txt
pinned=()
for name in pydantic pydantic-core simplejpeg omegaconf antlr4-python3-runtime webdataset hjson \
  typing-inspection annotated-types braceexpand einops msgpack py-cpuinfo; do
  pinned+=("$(grep -i "^$name==" "$constraints")")
done
mkdir -p "$folder"
python3 -m pip download --no-deps --only-binary=:all: --python-version "$version" \
  --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d "$folder" "${pinned[@]}"
# DeepSpeed comes as source; without its extensions the wheel suits every Python.
DS_BUILD_OPS=0 python3 -m pip wheel --no-deps -w "$folder" "$(grep '^deepspeed==' "$constraints")"
du -sh "$folder"
