"""Shell verbs. Each is a module of this package with a function `main(argv)`, imported when it is called."""
VERBS = {
    'bench': 'what training a binarized model costs beside its float host',
    'demo': 'train a binarized network on real images, offline, in under three minutes',
    'run': "run one of timm's scripts with these models registered",
    'sweep': 'binarize many nets and print what came of it',
    'summary': 'bits, bytes and operations of a model, layer by layer',
}
