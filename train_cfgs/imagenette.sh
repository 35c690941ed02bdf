#!/usr/bin/env bash
# The Imagenette weights, and their twins, one after the other:
#
#   train_cfgs/imagenette.sh DATA OUTPUT [options of train.py]
#
# DATA is an ImageFolder with train/ and validation/ of Imagenette's ten classes. TIMM_SCRIPTS names the folder of
# timm's scripts. Stopped and started again, it goes on behind the last finished epoch. Each run ends with its top-1 at
# three sizes, and that of a net, which is not a twin, with a folder that `timm-el push` could upload
# (OUTPUT/hub/NAME.imagenette): its packed file is what is evaluated, in all forms, at the best size
# (OUTPUT/NAME/eval.json). A finished stage of lease.sh that is unpacked in OUTPUT counts as trained.
#
#   NETS="el_resnet26 el_resnet26-bireal"    some of the runs below (default: all)
#   LAUNCH="torchrun --nproc_per_node 8"     several GPUs; then divide the batch: -b 8
#   DETAILS=FILE                             Markdown for the cards: hardware, hours
#   SIZES="128 160"                          pixels to evaluate at (default: 128 160 224)
#   --device cpu -j 1 --val-interval 2       options for a CPU
tag=imagenette dataset=Imagenette sizes=${SIZES:-128 160 224} floats=int8
labels='["tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck",
"gas pump", "golf ball", "parachute"]'
runs='
el_resnet26             el_resnet26
el_mobilenet_v1         el_mobilenet_v1
el_resnet26-float       el_resnet26      --model-kwargs recipe=host
el_resnet26-bireal      el_resnet26      --model-kwargs recipe=bireal
el_mobilenet_v1-float   el_mobilenet_v1  --model-kwargs recipe=host
el_mobilenet_v1-bireal  el_mobilenet_v1  --model-kwargs recipe=bireal
el_resnet50             el_resnet50
el_reactnet_c           el_reactnet_c
el_resnet50-float       el_resnet50      --model-kwargs recipe=host
el_resnet50-bireal      el_resnet50      --model-kwargs recipe=bireal
el_reactnet_c-reactnet  el_reactnet_c    --model reactnet_c
'
source "$(dirname "$0")/weights.sh"
