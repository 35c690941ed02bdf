#!/usr/bin/env bash
# All Imagenette networks in a given time, on a machine that may be taken away earlier:
#
#   train_cfgs/lease.sh IMAGES OUTPUT SECONDS [options of `timm-el fit`]
#
# IMAGES is an archive of pack_images.py. Within SECONDS, everything included: the cost of a training step, of EL and its
# float twin, eager and compiled (OUTPUT/steps.json); then the stages of fit/imagenette.yaml, each with as many epochs
# as its pace allows. OUTPUT gets STAGE.tar.gz and a line in summary.csv as soon as a stage is done. Ended by SIGTERM,
# the running stage hands over what it has. A finished stage, unpacked in a folder, is one that imagenette.sh evaluates
# and makes a Hub folder of.
#
#   DEVICE=cpu          (default: cuda)
#   WORK=DIR            checkpoints and decoded images, to go on from if it is run again (default: OUTPUT.work)
#   BENCH=el_resnet26   network of the measurement; BENCH_ARGS="--batch 256 --size 128" (default) what is measured of it
#
# A rehearsal with a hundred images:
#   python train_cfgs/pack_images.py imagenette few.tar.gz --limit 5
#   DEVICE=cpu BENCH_ARGS="--batch 4 --size 32 --pairs 1" train_cfgs/lease.sh few.tar.gz out 90 --set batch_size=16
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,/^[^#]/{/^[^#]/!s/^#\( \|$\)//p}' "$0" >&2
    exit 2
fi
images=$1 output=$2 budget=$3
shift 3
device=${DEVICE:-cuda} work=${WORK:-${output%/}.work} root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$output" "$work"

python - "$device" <<'CHECK'
import sys
try:
    import timm, torch, torchvision
    import timm_el
except ImportError as e:
    sys.exit(f'lease: {e}; the networks need torch, torchvision, huggingface_hub, safetensors, pyyaml and timm 1.0.31')
if tuple(int(n) for n in timm.__version__.split('.')[:3] if n.isdigit()) < (1, 0, 31):
    sys.exit(f'lease: found timm {timm.__version__}, expected 1.0.31 or later; put its wheel on PYTHONPATH')
try:
    name = torch.cuda.get_device_name(sys.argv[1]) if sys.argv[1].startswith('cuda') else 'CPU'
except (RuntimeError, AssertionError) as e:
    sys.exit(f'lease: DEVICE: found {sys.argv[1]!r}, which torch {torch.__version__} cannot use: {e}')
print(f'{name}, torch {torch.__version__}, timm {timm.__version__}')
CHECK

# step MODE [option]: what a step costs, within a tenth of the budget.
step() {
    # shellcheck disable=SC2086  # BENCH_ARGS are several words
    timeout "$((budget / 10 + 1))" python -m timm_el bench train "${BENCH:-el_resnet26}" --device "$device" --amp \
        --channels-last --opt adam ${BENCH_ARGS:---batch 256 --size 128} "${@:2}" --json > "$work/step.part" \
        && mv "$work/step.part" "$work/step_$1.json" || echo "a step, $1: not measured"
}
data=$work/$(basename "$images" .tar.gz)
mkdir -p "$data"
tar xf "$images" -C "$data" --strip-components 1
step eager
step compiled --compile

# Compiled if that saves more of a sixth of the budget than compiling takes. What was begun goes on as it began.
[ -e "$work/torchcompile" ] || python - "$work" "$output" "$budget" > "$work/torchcompile.part" <<'PAYS'
import json, os, sys
work, output, budget = sys.argv[1:]
paths = {mode: os.path.join(work, f'step_{mode}.json') for mode in ('eager', 'compiled')}
steps = {mode: json.load(open(path)) for mode, path in paths.items() if os.path.exists(path)}
json.dump(steps, open(os.path.join(output, 'steps.json'), 'w'), indent=2)
pays = False
if len(steps) == 2:
    saved = float(budget) / 6 * (1 - steps['compiled']['model_ms'] / steps['eager']['model_ms'])
    pays = saved > steps['compiled']['model_first_ms'] / 1e3
print('inductor' if pays else 'null')
PAYS
[ -e "$work/torchcompile" ] || mv "$work/torchcompile.part" "$work/torchcompile"
compile=$(cat "$work/torchcompile")
echo "torchcompile: $compile"
python -m timm_el fit "$root/train_cfgs/fit/imagenette.yaml" --data-dir "$data" --output "$work/runs" --cache "$work" \
    --device "$device" --workers "$(nproc)" --budget "$((budget - SECONDS - 10))" --hand-over "$output" \
    --set torchcompile="$compile" "$@" &
fit=$!
trap 'kill -TERM $fit' TERM INT
wait $fit || wait $fit
