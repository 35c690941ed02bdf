"""Shell verbs, each a module of this package with a function `main(argv)`, imported when it is called."""
VERBS = {
    'ablate': 'run or resume a table of ablations, or print it beside the paper',
    'bench': 'measure inference or training of a model beside its float host and other engines',
    'convert': 'binarize any net and print a report, layer by layer',
    'demo': 'classify photographs with shipped weights, then train on real images, offline, in about three minutes',
    'eval': 'top-1 of a network as it is, packed, deployed and in int8, from a folder of images',
    'export': 'write a network as files that run without torch: program, C, Python, a page, ONNX, OpenVINO',
    'fit': 'train stage by stage: two-stage, progressive, with teachers; resumable',
    'plot': 'pictures: gammas, feature maps, estimators, training curves, accuracy against size and time',
    'push': 'write a Hub folder of packed weights, check it, and upload it',
    'run': "run one of timm's scripts with these models registered",
    'summary': 'bits, bytes and operations of a model, layer by layer',
}
