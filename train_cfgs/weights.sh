# What cifar10.sh and imagenette.sh share; they set, and then read this file:
#
#   tag      of the weights, and the ending of the YAMLs: MODEL_TAG.yaml
#   dataset  for the card
#   labels   label names, as JSON
#   sizes    pixels at which the networks are evaluated; the best one is stated and shipped
#   runs     NAME CONFIG [options of train.py] a line; a NAME with a - is a twin, of which no folder is written
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,/^[^#]/{/^[^#]/!s/^#\( \|$\)//p}' "$0" >&2
    exit 2
fi
data=$1 output=$2
shift 2
configs=$(cd "$(dirname "$0")" && pwd)
source=(--dataset "${DATASET:-}" --data-dir "$data" ${DOWNLOAD:+--dataset-download})

# top1 FILE FORM: a number out of what eval printed.
top1() { python -c 'import json, sys; print(json.load(open(sys.argv[1]))["forms"][sys.argv[2]]["top1"])' "$1" "$2"; }

# best_size RUN: the size at which the latent network is best.
best_size() {
    local size best='' of_best=0 found
    for size in $sizes; do
        [ -e "$1/latent_$size.json" ] || {
            python -m timm_el eval "$1" "${source[@]}" --forms latent --img-size "$size" --json > "$1/latent.part"
            mv "$1/latent.part" "$1/latent_$size.json"
        }
        found=$(top1 "$1/latent_$size.json" latent)
        if python -c 'import sys; sys.exit(float(sys.argv[1]) <= float(sys.argv[2]))' "$found" "$of_best"; then
            best=$size of_best=$found
        fi
    done
    echo "$best"
}

while read -r -u 3 name config options; do
    [ -n "$name" ] || continue
    [[ -z ${NETS:-} || " $NETS " == *" $name "* ]] || continue
    run=$output/$name
    if [ ! -e "$run/finished" ]; then
        resume=()
        [ ! -e "$run/last.pth.tar" ] || resume=(--resume "$run/last.pth.tar")
        # shellcheck disable=SC2086  # options and LAUNCH are several words
        ${LAUNCH:-python} -m timm_el run train.py -c "$configs/${config}_$tag.yaml" "${source[@]}" \
            --output "$output" --experiment "$name" $options "${resume[@]}" "$@"
        touch "$run/finished"
    fi
    forms=latent,packed,deployed
    [[ $name != *-float ]] || forms=latent
    size=$(best_size "$run")
    [ -e "$run/eval.json" ] || {
        python -m timm_el eval "$run" "${source[@]}" --forms "$forms" --img-size "$size" --json > "$run/eval.part"
        mv "$run/eval.part" "$run/eval.json"
    }
    found=$(top1 "$run/eval.json" latent)
    echo "$name: top-1 $found at $size px"
    [[ $name == *-* || -e $output/hub/$name.$tag/README.md ]] || python -m timm_el push "USER/$name.$tag" \
        --model "$run" --float-dtype float16 --dataset "$dataset" --metric "top1=$found" \
        --folder "$output/hub/$name.$tag" --dry-run \
        --pretrained-cfg "{\"tag\": \"$tag\", \"input_size\": [3, $size, $size], \"label_names\": $labels}"
done 3<<< "$runs"
