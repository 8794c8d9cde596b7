#!/usr/bin/env bash
# All that needs a GPU, in one command of under nine minutes: build, correctness, compute-sanitizer, benchmarks.
#
#     benchmarks/gpu_check.sh [FOLDER] [--wheels DIR] [--commit NAME]
#
# FOLDER (else $OUT, else out/gpu_check) gets gpu_check.json, gpu_check.log and the benchmarks' JSON. PYTHON names the
# interpreter; without it .venv's is taken, else python3. Exit codes: 0 all passed, 1 a stage failed, 2 wrong usage,
# 3 no GPU (what can be checked without one has passed).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$PATH:/usr/local/cuda/bin"
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
fi
exec "$python" "$root/benchmarks/gpu_check.py" "$@"
