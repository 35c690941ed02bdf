#!/usr/bin/env bash
# The networks of the CIFAR papers, el_resnet20 and el_resnet18 with the small stem at 32 px, with the recipes el,
# bireal, reactnet and el_r2b_rprelu, and their float twins, one after the other:
#
#   train_cfgs/cifar10_32px.sh DATA OUTPUT [options of `timm-el ablate`]
#
# DATA is an ImageFolder with train/ and validation/. Stopped and started again, it goes on behind the last validated
# epoch. Each network ends with its line in OUTPUT/NET/results.jsonl, and each binarized one with its top-1 as it is,
# packed and deployed (OUTPUT/NET/RECIPE/eval.json) and a folder that `timm-el push` could upload.
#
#   NETS=resnet20                                one of the two (default: resnet20 resnet18)
#   ROWS="el bireal"                             some of the recipes (default: all; host is the float twin)
#   --device cuda                                on a GPU, 200 epochs
#   --set epochs=40                              on one core of a CPU: taskset -c 0, OMP_NUM_THREADS=1
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,/^[^#]/{/^[^#]/!s/^#\( \|$\)//p}' "$0" >&2
    exit 2
fi
data=$1 output=$2
shift 2
configs=$(cd "$(dirname "$0")" && pwd)
labels='["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]'
for net in ${NETS:-resnet20 resnet18}; do
    for row in ${ROWS:-el bireal reactnet el_r2b_rprelu host}; do
        run=$output/$net/$row/seed_0
        python -m timm_el ablate "$configs/fit/cifar10_${net}.yaml" --data-dir "$data" --output "$output/$net" \
            --cache "$output" --seeds 1 --rows "$row" "$@"
        [ "$row" != host ] || continue
        [ -e "$output/$net/$row/eval.json" ] || {
            python -m timm_el eval "$run" --data-dir "$data" --json > "$run/eval.part"
            mv "$run/eval.part" "$output/$net/$row/eval.json"
        }
        found=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["forms"]["packed"]["top1"])' \
            "$output/$net/$row/eval.json")
        [ -e "$output/hub/el_$net-$row.cifar10/README.md" ] || python -m timm_el push "USER/el_$net-$row.cifar10" \
            --model "$run" --float-dtype float16 --dataset CIFAR-10 --metric "top1=$found" \
            --folder "$output/hub/el_$net-$row.cifar10" --dry-run \
            --pretrained-cfg "{\"tag\": \"cifar10\", \"label_names\": $labels}"
    done
done
