# What cifar10.sh and imagenette.sh share; they set, and then read this file:
#
#   tag      of the weights, and the ending of the YAMLs: MODEL_TAG.yaml
#   dataset  for the card
#   labels   label names, as JSON
#   sizes    pixels at which the networks are evaluated; the best one is stated and shipped
#   floats   dtype of the real weights in the shipped files
#   runs     NAME CONFIG [options of train.py] a line; a NAME with a - is a twin, of which no folder is written
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,/^[^#]/{/^[^#]/!s/^#\( \|$\)//p}' "$0" >&2
    exit 2
fi
data=$1 output=$2
shift 2
configs=$(cd "$(dirname "$0")" && pwd)
trap 'exit 130' INT  # train.py ends with 0 then, and nothing is finished
source=(--dataset "${DATASET:-}" --data-dir "$data" ${DOWNLOAD:+--dataset-download})

# top1 FILE FORM: a number out of what eval printed.
top1() { python -c 'import json, sys; print(round(json.load(open(sys.argv[1]))["forms"][sys.argv[2]]["top1"], 2))' "$1" "$2"; }

# best_size RUN: the size at which the network is best, deployed, which is quickest, or latent if it is float.
best_size() {
    local size best='' of_best=0 found form=deployed
    [[ $1 != *-float ]] || form=latent
    for size in $sizes; do
        [ -e "$1/size_$size.json" ] || {
            python -m timm_el eval "$1" "${source[@]}" --forms "$form" --img-size "$size" --json > "$1/size.part" || return
            mv "$1/size.part" "$1/size_$size.json"
        }  # `set -e` does not reach into a function whose output is read
        found=$(top1 "$1/size_$size.json" "$form")
        if python -c 'import sys; sys.exit(float(sys.argv[1]) <= float(sys.argv[2]))' "$found" "$of_best"; then
            best=$size of_best=$found
        fi
    done
    echo "$best"
}

# write_folder NAME [options of push]: the folder that `timm-el push` could upload.
write_folder() {
    local name=$1
    shift
    python -m timm_el push "USER/$name.$tag" --model "$output/$name" --float-dtype "$floats" --dataset "$dataset" \
        --folder "$output/hub/$name.$tag" --dry-run "$@" \
        --pretrained-cfg "{\"tag\": \"$tag\", \"input_size\": [3, $size, $size], \"label_names\": $labels}"
}

# evaluate NET FORMS RUN: RUN/eval.json, at the size that was found best.
evaluate() {
    python -m timm_el eval "$1" "${source[@]}" --forms "$2" --img-size "$size" --json > "$3/eval.part"
    mv "$3/eval.part" "$3/eval.json"
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
    if [ ! -e "$run/last.pth.tar" ] && [ ! -e "$run/packed.safetensors" ]; then
        echo "$name: handed over without weights; log.jsonl has its top-1"  # a float network of a lease
        continue
    fi
    size=$(best_size "$run")
    if [[ $name == *-* ]]; then
        [ -e "$run/eval.json" ] || evaluate "$run" latent "$run"
    elif [ ! -e "$run/eval.json" ]; then
        write_folder "$name"
        evaluate "$output/hub/$name.$tag" latent,packed,deployed,int8 "$run"
    fi
    echo "$name: top-1 $(top1 "$run/eval.json" latent) at $size px"
done 3<<< "$runs"

# The cards, once all are evaluated: each with its results, its curve and its twins.
while read -r -u 3 name _; do
    run=$output/$name
    [[ -n $name && $name != *-* && -e $run/eval.json ]] || continue
    size=$(best_size "$run")
    twins=()
    for twin in "$output/$name"-*/; do
        [ ! -e "$twin/eval.json" ] || { twin=${twin%/} && twins+=(--twin "${twin##*-}=$twin"); }
    done
    card=(--metric "top1=$(top1 "$run/eval.json" latent)" ${DETAILS:+--details "$DETAILS"})
    # Stages of a lease differ in their epochs, and a twin of another budget does not stand on a card.
    write_folder "$name" "${card[@]}" "${twins[@]}" || write_folder "$name" "${card[@]}"
done 3<<< "$runs"
