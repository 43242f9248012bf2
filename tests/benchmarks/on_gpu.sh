#!/usr/bin/env bash
# Test and time the project on a machine with a CUDA GPU, in ten minutes at most. Jobs for which no time is left
# are named: run them by ONLY.
#
#     bash tests/benchmarks/on_gpu.sh [folder]
#     ONLY="tests epochs" bash tests/benchmarks/on_gpu.sh [folder]    these jobs alone
#     DEVICE=cpu bash tests/benchmarks/on_gpu.sh [folder]             small models, to try the script itself
#
# The folder (default: ./on_gpu) gets log.txt, a line for each job, and results.tar.gz, with what the jobs printed
# and the notebooks as executed, packed anew after each job. A job that fails or runs out of time is noted there,
# and the next one starts. PYTHON names the interpreter, LIMIT the seconds of all jobs together. CIFAR-10 has to
# be in data/.

folder=${1:-./on_gpu}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) && cd "$(dirname "$0")/../.." || exit 1
python=${PYTHON:-python3} device=${DEVICE:-cuda} limit=${LIMIT:-590} only=${ONLY:-}
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
mkdir "$work/cv" && cp -r cv/trained_rnet "$work/cv/"
: > "$folder/log.txt"
export PYTHONUNBUFFERED=1

job() { # name, seconds at most, command
    local name=$1 seconds=$2 left=$((limit - SECONDS)) start=$SECONDS status
    shift 2
    [[ -z $only || " $only " == *" $name "* ]] || return
    ((seconds < left)) || seconds=$left
    if ((seconds < 5)); then
        echo "$name: left out, the time is up" | tee -a "$folder/log.txt"
        return
    fi
    timeout --signal=INT --kill-after=5 "$seconds" "$@" > "$work/$name.log" 2>&1
    status=$?
    ((status == 124 || status == 137)) && status="$status (out of time)"
    echo "$name: $((SECONDS - start)) s, exit status $status" | tee -a "$folder/log.txt"
    tar -czf "$folder/new.tar.gz" --exclude="*.t7" --exclude=".lock" -C "$work" .
    (($? < 2)) && mv "$folder/new.tar.gz" "$folder/results.tar.gz" # 1: a file changed meanwhile
}

notebook() { # name of the job, seconds at most, notebook, settings
    local name=$1 seconds=$2 notebook=$3
    shift 3
    job "$name" "$seconds" "$python" -m papermill --cwd . --no-progress-bar "$notebook.ipynb" "$work/$name.ipynb" \
        -p device "$device" "$@" "${few[@]}"
}

if [[ $device == cuda ]]; then
    deep=R110_C10 shipped=(R20_SYN R32_C10 R110_C10) few=() some=() look=()
    times=(--seconds 0.2 --kept 15) batches=(--batches 8 --epochs-at 128 512) large=2048
    job machine 30 bash -c "nvidia-smi; $python -c 'import torch, triton; print(torch.__version__, triton.__version__)'"
else
    deep=R8_SYN shipped=(R20_SYN) few=(-p max_images 100) some=(-k R8_SYN-1-) look=(-p seconds 0.01)
    times=(--seconds 0.01 --kept 1 --batches 1 4) batches=(--batches 1 --epochs-at 16 32) large=32
fi

pytest=("$python" -m pytest -p no:cacheprovider tests/test_fused.py)
job tests 300 "${pytest[@]}" tests/test_cuda.py -vv --tb=short --durations=10 "${some[@]}"
if [[ $device == cuda ]] && command -v compute-sanitizer > /dev/null; then
    # Without PyTorch's memory cache, an access beyond a tensor is one beyond what was allocated.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 job sanitizer 90 \
        compute-sanitizer --kernel-regex kns=_resnet --report-api-errors no --error-exitcode 9 "${pytest[@]}" -n 0 -k several_per_program
fi

job inference 90 "$python" tests/benchmarks/inference.py --model $deep "${times[@]}"
job epochs 70 "$python" tests/benchmarks/blockdrop.py --model $deep "${batches[@]}"

job plain 60 "$python" tests/benchmarks/blockdrop.py --model $deep --batch-size $((large / 16)) --batches 3
job memory 40 "$python" tests/benchmarks/blockdrop.py --model $deep --batch-size $large --batches 1 --memory

training=(-p model $deep -p batch_size 128 -p cv_dir "$work/cv/")
notebook blockdrop_training 90 blockdrop_training "${training[@]}" -p skip_dropped False \
    -p max_epochs_stochastic_depth 1 -p max_epochs_training 2 -p max_epochs_finetuning 1
notebook rnet_sole 70 rnet_sole "${training[@]}" -p epochs 2

for model in "${shipped[@]}"; do
    notebook "inference_$model" 100 blockdrop_inference -p model "$model" -p results_dir "$work/results/" "${look[@]}"
done
