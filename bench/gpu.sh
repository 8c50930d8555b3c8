#!/usr/bin/env bash
# Everything that needs a CUDA machine, in one go: build, GPU tests, benchmarks. Needs no network.
#   bench/gpu.sh DIR        result files go to DIR; PYTHON names the interpreter
# A failing part is shown in the table at the end and does not keep the others from running.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bench/gpu.sh DIR}" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
summary=()
failed=0

part() { # part NAME COMMAND...
    local name=$1 start=$SECONDS verdict=passed
    shift
    "$@" >"$out/$name.log" 2>&1 || { verdict="FAILED ($?)"; failed=1; }
    summary+=("$(printf '%-10s %-14s %4d s   %s' "$name" "$verdict" $((SECONDS - start)) "$(tail -n 1 "$out/$name.log")")")
}

part build "$python" -m pip install --no-build-isolation --no-deps -e .
part doctor "$python" -m rlsedit_fast --json "$out/doctor.json"
part tests "$python" -m pytest -q tests -m gpu
if command -v compute-sanitizer >/dev/null; then
    # Without torch's cache every tensor is an allocation of its own, and an access beside it shows.
    for tool in memcheck racecheck initcheck; do
        part "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" bench/gpu_cases.py cuda
    done
else
    summary+=("compute-sanitizer is not here: left out")
fi
part gpu "$python" bench/gpu.py --json "$out/gpu.json"
part step "$python" bench/step.py --device cuda --d 14336 --json "$out/step-cuda.json" --no-solves
part solves "$python" bench/step.py --device cuda --d 14336 --n 16 100 --rounds 2 --json "$out/step-solves-cuda.json"
part values "$python" bench/values.py --device cuda --json "$out/values-cuda.json"
part stream "$python" bench/edit_stream.py --device cuda --model llama-3-8b --search-memory 3000000000 \
    --json "$out/edit-stream-cuda.json"
part panel "$python" bench/panel.py --d 8192 --json "$out/panel-cpu.json"

"$python" -m rlsedit_fast
echo
cat "$out/gpu.log"
echo
printf '%s\n' "${summary[@]}"
exit $failed
