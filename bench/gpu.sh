#!/usr/bin/env bash
# Runs everything that needs a CUDA machine: build, GPU tests, compute-sanitizer, benchmarks. Needs no network.
#   bench/gpu.sh DIR [PART...]     results and logs go to DIR; runs all parts by default; PYTHON selects the interpreter
# Parts: tests tune gpu step solves states values stream capped memcheck racecheck initcheck triton. The build always runs
# first. Every part has a time limit; a failing part does not prevent the others. `summary` lists the outcomes.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bench/gpu.sh DIR [PART...]}" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
shift
python=${PYTHON:-python3}
parts=${*:-tests tune gpu step solves states values stream capped memcheck racecheck initcheck triton}
failed=0
# Build tools in the folder of the interpreter and in the default CUDA folder; building the kernels needs them.
PATH="$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH:/usr/local/cuda/bin"
export PATH PYTHONUNBUFFERED=1 RLSEDIT_BUILD_CPU=1 RLSEDIT_BUILD_CUDA=1

part() { # part NAME SECONDS COMMAND...
    local name=$1 most=$2 start=$SECONDS verdict=passed
    shift 2
    # On SIGINT, pytest and the benchmarks still report their results so far.
    timeout --signal=INT --kill-after=20 "$most" "$@" >"$out/$name.log" 2>&1 || { verdict="FAILED ($?)"; failed=1; }
    printf '%-10s %-14s %4d s   %s\n' "$name" "$verdict" $((SECONDS - start)) "$(tail -n 1 "$out/$name.log")" |
        tee -a "$out/summary"
}

sanitize() { # sanitize NAME BACKEND OPTIONS...
    local name=$1 backend=$2
    shift 2
    # Without the caching allocator, every tensor is a separate allocation and out-of-bounds accesses are detected.
    part "$name" 240 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer "$@" --error-exitcode 9 "$python" bench/gpu_cases.py "$backend"
}

part build 300 "$python" -m pip install --no-build-isolation --no-deps -e .
part doctor 60 "$python" -m rlsedit_fast --json "$out/doctor.json"
part backends 60 "$python" -c 'from rlsedit_fast.ops import available_backends as have
assert {"triton", "cuda"} <= set(have()), f"only {have()}: see doctor.log; the following parts would skip them"'

export RLSEDIT_BACKEND=cuda,triton
for name in $parts; do
    case $name in
        tests) part tests 400 env -u RLSEDIT_BACKEND OMP_NUM_THREADS=2 "$python" -m pytest -q -rs --tb=short -n 8 tests -m gpu ;;
        tune)
            part tune 400 env -u RLSEDIT_BACKEND RLSEDIT_CACHE="$out/cache" \
                "$python" -m rlsedit_fast doctor --tune --json "$out/tune.json"
            ;;
        gpu) part gpu 400 "$python" bench/gpu.py --repeats 7 --json "$out/gpu.json" ;;
        step) part step 240 "$python" bench/step.py --device cuda --d 14336 --no-solves --json "$out/step-cuda.json" ;;
        solves)
            part solves 120 "$python" bench/step.py --device cuda --d 14336 --n 16 100 --rounds 3 \
                --json "$out/step-solves-cuda.json"
            ;;
        states) part states 120 "$python" bench/state_build.py --device cuda --d 14336 --json "$out/state-build-cuda.json" ;;
        values) part values 400 "$python" bench/values.py --device cuda --json "$out/values-cuda.json" ;;
        stream)
            part stream 400 "$python" bench/edit_stream.py --device cuda --model llama-3-8b --edits 1000 \
                --search-memory 20000000000 --json "$out/edit-stream-cuda.json"
            ;;
        capped) # like a GPU with 24 GB
            part capped 400 "$python" bench/edit_stream.py --device cuda --model llama-3-8b --edits 500 \
                --search-memory 2000000000 --memory-cap 24000000000 --json "$out/edit-stream-24gb.json"
            ;;
        memcheck) sanitize memcheck cuda --tool memcheck --report-api-errors no ;;
        racecheck) sanitize racecheck cuda --tool racecheck --kernel-regex kns=rlsedit ;;
        initcheck) # a hint, which fails nothing: cuBLAS's own workspaces may show
            before=$failed
            sanitize initcheck cuda --tool initcheck
            failed=$before
            ;;
        triton) sanitize triton triton --tool memcheck --report-api-errors no ;;
        *)
            echo "no part $name" >&2
            failed=1
            ;;
    esac
done
exit $failed
