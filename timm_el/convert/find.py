"""Search for the sites of a host: by the table of known blocks, else by data flow."""
import torch.nn as nn

from ..dry_run import LayerRun
from ..kinds import is_act
from . import judgements
from .known_blocks import find_known_networks
from .sites import Group, Network, Place, Site, role_of
from .traced_graph import TracedGraph, Untraceable, trace


def find_sites(model: nn.Module, runs: dict[str, LayerRun]) -> list[Network]:
    """Return the networks in a host.

    Args:
        model: The host; it is not changed.
        runs: Runs of its layers (`dry_run.run_layers`), as far as they are known.
    """
    return find_known_networks(model, runs) or [find_traced_network(model, runs)]


def find_traced_network(model: nn.Module, runs: dict[str, LayerRun]) -> Network:
    """Return the network that torch.fx sees; nothing rests on names or on the order of registration."""
    graphs, failures = trace(model, runs)
    sites: list[Site] = []
    loose: list[Place] = []
    for graph in graphs:
        found, more = _read(graph)
        sites += found
        loose += more
    image_conv = _image_conv(graphs[0]) if graphs else None
    return Network(
        (Group(tuple(sites)),), is_traced=True, loose_acts=tuple(loose), image_conv=image_conv,
        notes=tuple(_note(failure) for failure in failures))


def _read(graph: TracedGraph) -> tuple[list[Site], list[Place]]:
    """Return the sites of a graph, and the activations outside of them that stand before a sign."""
    pairs = {conv: judgements.norm_and_act_nodes(graph, conv) for conv in graph.convs}
    kept = {conv: why for conv, (norm, _) in pairs.items() if (why := judgements.why_kept(graph, conv, norm))}
    binary = [conv for conv in graph.convs if conv not in kept]
    signed = [conv.args[0] for conv in binary] + [x for node in graph.opaque for x in node.all_input_nodes]
    dropped = judgements.acts_before(graph, signed, binary)
    sites, in_sites = [], set()
    for conv, (norm, act) in pairs.items():
        if act is not None and (act.target not in dropped or norm is None and conv in kept):
            act = None
        in_sites.update(node.target for node in (norm, act) if node is not None)
        # The activation inside a norm is found there.
        separate = act is not None and is_act(graph.module(act))
        sites.append(Site(
            _place_of(graph, conv), norm and _place_of(graph, norm), _place_of(graph, act) if separate else None,
            role_of(graph.module(conv)), (), kept.get(conv),
            judgements.why_no_link(graph, conv, norm, binary, dropped),
            conv in binary and judgements.is_non_negative(graph, conv.args[0], dropped)))
    loose = [graph.modules[name] for name in sorted(dropped) if name not in in_sites]
    return sites, [Place(graph.paths[module], module) for module in loose]


def _place_of(graph: TracedGraph, node) -> Place:
    return Place(graph.path(node), graph.module(node))


def _image_conv(graph: TracedGraph):
    """Return the place of the convolution that reads the images themselves, or None."""
    return next((_place_of(graph, conv) for conv in graph.convs if isinstance(graph.module(conv), nn.Conv2d)
                 and graph.reads_images and conv.args[0].op == 'placeholder'), None)


def _note(failure: Untraceable) -> str:
    return (f'torch.fx cannot trace {failure.path or "the model"} ({failure.kind}, {failure.error}): '
            f'it is taken by its module structure, each part by itself')
