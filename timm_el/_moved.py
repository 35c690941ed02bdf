"""Modules that moved: an import by the old name says where they are."""
import importlib.abc
import sys

MOVED = {
    'timm_el.packed': 'timm_el.weights.packed', 'timm_el.checkpoints': 'timm_el.weights.loading',
    'timm_el.bits': 'timm_el.weights.bits', 'timm_el.shapes': 'timm_el.dry_run',
    'timm_el.methods': 'timm_el.layers', 'timm_el.blocks': 'timm_el.convert.known_blocks',
    'timm_el.graph': 'timm_el.convert.traced_graph', 'timm_el.signs': 'timm_el.convert.dead_signs',
}


def moved_to(name: str) -> str | None:
    """Return a sentence that says where a module is now, None if it has not moved."""
    return f'{name} is {MOVED[name]} now' if name in MOVED else None


class _MovedModules(importlib.abc.MetaPathFinder):
    """Last of the finders of modules: it fails for an old name, and its error says the new one."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname in MOVED:
            raise ModuleNotFoundError(moved_to(fullname), name=fullname)


sys.meta_path.append(_MovedModules())
