#!/usr/bin/env bash
# CIFAR-10 weights of the four nets, and their twins, one after the other:
#
#   train_cfgs/cifar10.sh DATA OUTPUT [options of train.py]
#
# DATA is an ImageFolder with train/ and validation/, or where torchvision keeps CIFAR-10 (DATASET=torch/cifar10
# DOWNLOAD=1). TIMM_SCRIPTS names the folder of timm's scripts. Stopped and started again, it goes on behind the last
# finished epoch. Each run ends with its top-1 (OUTPUT/NAME/eval.json), and that of a net, which is not a twin, with a
# folder that `timm-el push` could upload (OUTPUT/hub/NAME.cifar10): its packed file is what is evaluated, in all forms.
#
#   NETS="el_resnet26 el_resnet26-bireal"    some of the runs below (default: all)
#   LAUNCH="torchrun --nproc_per_node 8"     several GPUs; then divide the batch: -b 32
#   DETAILS=FILE                             Markdown for the cards: hardware, hours
#   SIZES=32                                 pixels to evaluate at (default: 64)
tag=cifar10 dataset=CIFAR10 sizes=${SIZES:-64} floats=float16
labels='["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]'
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
source "$(dirname "$0")/weights.sh"
