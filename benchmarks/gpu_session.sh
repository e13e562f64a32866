#!/usr/bin/env bash
# What only a GPU can tell, in one go of some eight minutes:
#
#   bash benchmarks/gpu_session.sh OUT DATA        # DATA: the folder that models/prepare_data.py wrote
#   bash benchmarks/gpu_session.sh OUT DATA cpu    # a dry run on few questions
#
# Each step leaves one file in OUT; a step whose file is there is skipped, so the same command goes on after a stop.
# PYTHON names the interpreter, WORK the folder for runs and bundles.
set -u
out=$1 data=$2 device=${3:-cuda}
python=${PYTHON:-python3} work=${WORK:-$out/work}
mkdir -p "$out" "$work"
started=$(date +%s)
half=$(($(nproc) / 2)) # two steps run side by side, on half of the cores each
first_cores=0-$((half - 1)) other_cores=$half-$(($(nproc) - 1))
few=() short=() bench=()
[ "$device" = cpu ] && few=(--max-train-samples 60 --max-eval-samples 40) short=(--seconds 2)

step() { # FILE SECONDS COMMAND...: runs it unless its file is there, and says how long it took
    local file=$1 limit=$2 began
    shift 2
    [ -e "$out/$file" ] && { echo "$file: there already"; return; }
    began=$(date +%s)
    timeout "$limit" "$@" > "$work/$file.log" 2>&1
    echo "$file: exit $?, $(($(date +%s) - began)) s, at $(($(date +%s) - started)) s"
    [ -e "$out/$file" ] || tail -n 12 "$work/$file.log"
}

kept() { # FILE RUN: the figures of a run
    "$python" - "$out/$1" "$2" <<'PY'
import json, pathlib, sys
run = pathlib.Path(sys.argv[2])
record, metrics = (json.loads((run / name).read_text()) for name in ("run.json", "metrics.json"))
pathlib.Path(sys.argv[1]).write_text(json.dumps({"run": record, "metrics": metrics}, indent=2))
PY
}

training() { # FILE RUN FLAGS...
    local file=$1 run=$2
    shift 2
    "$python" -m qadeploy train --data "$data/train.jsonl" --eval-data "$data/held_out_wiki.jsonl" --out "$run" \
        --device "$device" --epochs 2 --batch-tokens 16384 --learning-rate 1e-4 --dev-fraction 0.03 \
        "${few[@]}" "$@" && kept "$file" "$run"
}

exporting() {
    "$python" -m qadeploy export "$work/run" --out "$work/base" --device "$device" --no-optimize \
        --eval-data "$data/held_out_1000.jsonl" && cp "$work/base-fp16/manifest.json" "$out/export.json"
}

export -f kept training exporting
export out data device python work
[ "$device" = cpu ] && exporting() { # a CPU makes no fp16 bundle: the fp32 one stands for it
    "$python" -m qadeploy export "$work/run" --out "$work/base-fp16" --no-optimize && cp "$work/base-fp16/manifest.json" "$out/export.json"
}
export -f exporting

"$python" -m qadeploy doctor --json > "$out/doctor.json" 2> "$work/doctor.log"
step exports.done 200 taskset -c "$other_cores" "$python" -m benchmarks.gpu --device "$device" \
    --exports "$work/exports" --only-export "$work/none.json" &
step train.json 200 taskset -c "$first_cores" bash -c "few=(${few[*]}); training train.json \"\$work/run\""
wait
step train_compiled.json 150 taskset -c "$other_cores" bash -c \
    "few=(${few[*]}); training train_compiled.json \"\$work/compiled\" --torch-compile --max-train-samples ${COMPILED_SAMPLES:-9000}" &
step export.json 150 taskset -c "$first_cores" bash -c exporting
wait
step gpu.json 260 "$python" -m benchmarks.gpu "$out/gpu.json" --device "$device" --exports "$work/exports"
step gpu_serve.json 90 "$python" -m benchmarks.gpu_serve "$work/base-fp16" "$out/gpu_serve.json" --device "$device" "${short[@]}"
