#!/usr/bin/env bash
# Everything that needs a GPU, in one call and without a network: the tests marked gpu, then the benchmarks on the GPU.
#
#     tests/benchmarks/gpu.sh              # results in $OUT, or in ./gpu-results
#
# PYTHON names the interpreter (default python3); it needs the package's dependencies, pytest and CuPy.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
out=${OUT:-gpu-results}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if ! "$python" -c "import sys, stemtomo.backend as b; sys.exit(not b.gpu_available())"; then
  echo "gpu.sh: CuPy is missing or sees no GPU; pip install '.[cuda]' and check nvidia-smi" >&2
  exit 2
fi
mkdir -p "$out"
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee "$out/gpu.txt"
"$python" -m pytest -m gpu -p no:cacheprovider -rA --junitxml="$out/tests.xml" 2>&1 | tee "$out/tests.txt"
tests=$?
"$python" -m tests.benchmarks.gpu "$out/benchmarks.json" 2>&1 | tee "$out/benchmarks.txt"
benchmarks=$?
echo "tests: exit code $tests; benchmarks: exit code $benchmarks; results in $out"
exit $((tests != 0 ? tests : benchmarks))
