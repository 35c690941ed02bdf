#!/usr/bin/env bash
# The CIFAR-10 weights that are shipped, and their twins, one after the other:
#
#   train_cfgs/cifar10.sh DATA OUTPUT [options of train.py]
#
# DATA is an ImageFolder with train/ and validation/, or where torchvision keeps CIFAR-10 (DATASET=torch/cifar10
# DOWNLOAD=1). TIMM_SCRIPTS names the folder of timm's scripts. Stopped and started again, it goes on behind the last
# finished epoch. Each run ends with its top-1 as it is, packed and deployed (OUTPUT/NAME/eval.json), and for the nets
# that are shipped with a folder that `python -m timm_el push` could upload (OUTPUT/hub/NAME.cifar10).
#
#   NETS="el_resnet26 el_resnet26-bireal"    some of the runs below (default: all)
#   LAUNCH="torchrun --nproc_per_node 8"     several GPUs; then divide the batch: -b 32
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,/^set/{/^set/!s/^#\( \|$\)//p}' "$0" >&2
    exit 2
fi
data=$1 output=$2
shift 2
configs=$(cd "$(dirname "$0")" && pwd)
source=(--dataset "${DATASET:-}" --data-dir "$data" ${DOWNLOAD:+--dataset-download})

labels='{"tag": "cifar10", "label_names": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse",
"ship", "truck"]}'

# NAME CONFIG [options]; a NAME with a - is a twin.
runs='
el_resnet26             el_resnet26
el_resnet26-bireal      el_resnet26      --model-kwargs recipe=bireal
el_resnet26-float       el_resnet26      --model-kwargs recipe=host
el_mobilenet_v1         el_mobilenet_v1
el_mobilenet_v1-bireal  el_mobilenet_v1  --model-kwargs recipe=bireal
el_mobilenet_v1-float   el_mobilenet_v1  --model-kwargs recipe=host
el_resnet50             el_resnet50
el_resnet50-bireal      el_resnet50      --model-kwargs recipe=bireal
el_resnet50-float       el_resnet50      --model-kwargs recipe=host
el_reactnet_c           el_reactnet_c
el_reactnet_c-reactnet  el_reactnet_c    --model reactnet_c
'
while read -r -u 3 name config options; do
    [ -n "$name" ] || continue
    [[ -z ${NETS:-} || " $NETS " == *" $name "* ]] || continue
    run=$output/$name
    if [ ! -e "$run/finished" ]; then
        resume=()
        [ ! -e "$run/last.pth.tar" ] || resume=(--resume "$run/last.pth.tar")
        # shellcheck disable=SC2086  # options and LAUNCH are several words
        ${LAUNCH:-python} -m timm_el run train.py -c "$configs/${config}_cifar10.yaml" "${source[@]}" \
            --output "$output" --experiment "$name" $options "${resume[@]}" "$@"
        touch "$run/finished"
    fi
    forms=latent,packed,deployed
    [[ $name != *-float ]] || forms=latent
    [ -e "$run/eval.json" ] || {
        python -m timm_el eval "$run" "${source[@]}" --forms "$forms" --json > "$run/eval.part"
        mv "$run/eval.part" "$run/eval.json"
    }
    top1=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["forms"]["latent"]["top1"])' "$run/eval.json")
    echo "$name: top-1 $top1"
    [[ $name == *-* || -e $output/hub/$name.cifar10/README.md ]] || python -m timm_el push "USER/$name.cifar10" \
        --model "$run" --float-dtype float16 --dataset CIFAR10 --metric "top1=$top1" \
        --folder "$output/hub/$name.cifar10" --pretrained-cfg "$labels" --dry-run
done 3<<< "$runs"
