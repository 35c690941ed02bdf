"""Classes of processors, each of which runs the same kernels, here and in the peers, and the caps that emulate one.

A class is emulated by environment variables. This package, torch, MKL and oneDNN (in torch and in OpenVINO) read them
when they are loaded, so they are set before the process starts.
"""
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PEER_CAPS = ('ONEDNN_MAX_CPU_ISA', 'ATEN_CPU_CAPABILITY', 'MKL_ENABLE_INSTRUCTIONS')
CAPS = ('TIMM_EL_ISA', *PEER_CAPS)


@dataclass(frozen=True)
class ProcessorClass:
    """One class of processors.

    Args:
        name: Name on the command line and in records.
        example: Processors of this class.
        needs: Features that a processor of this class has, by Linux's names.
        isa: Instruction set of this package that runs there.
        peer_caps: Values of `PEER_CAPS` that hold peers down to this class; None where nothing does, and so a higher
            processor cannot emulate the class.
        lacks: Words in the name of a kernel that this class cannot run.
    """
    name: str
    example: str
    needs: tuple[str, ...]
    isa: str
    peer_caps: tuple[str, str, str] | None = None
    lacks: tuple[str, ...] = ()

    @property
    def caps(self) -> dict[str, str]:
        """Values of `CAPS` that emulate this class; empty if that cannot be done."""
        return dict(zip(CAPS, (self.isa, *self.peer_caps))) if self.peer_caps else {}

    def runs_on(self, features: Iterable[str]) -> bool:
        """Return whether a processor with these features has all that this class needs."""
        return set(self.needs) <= set(features)

    def can_run(self, kernels: str) -> bool:
        """Return whether no kernel among these names is beyond this class."""
        return not any(word in kernels.lower() for word in self.lacks)


# Highest first; the last one takes every processor. A processor without VNNI keeps oneDNN from it by itself.
CLASSES = (
    ProcessorClass(
        'amx', 'Xeon from Sapphire Rapids on', ('amx_int8', 'avx512_vpopcntdq', 'avx512_vnni'), 'avx512'),
    ProcessorClass(
        'vpopcntdq', 'Xeon Ice Lake, EPYC and Ryzen from Zen 4 on', ('avx512_vpopcntdq', 'avx512_vnni'), 'avx512',
        ('AVX512_CORE_VNNI', 'avx512', 'AVX512'), ('amx',)),
    ProcessorClass(
        'avx512', 'Xeon Skylake, Cascade Lake', ('avx512bw', 'avx512vl', 'avx512dq'), 'avx512bw',
        ('AVX512_CORE_VNNI', 'avx512', 'AVX512'), ('amx',)),
    ProcessorClass(
        'avx2', 'Core from Haswell on, EPYC and Ryzen up to Zen 3', ('avx2', 'fma'), 'avx2',
        ('AVX2', 'avx2', 'AVX2'), ('amx', 'avx512')),
    ProcessorClass(
        'sse4', 'x86-64 without AVX2', ('sse4_1',), 'portable',
        ('SSE41', 'default', 'SSE4_2'), ('amx', 'avx512', 'avx2')),
    ProcessorClass('arm-dot', 'Arm with dot products: Graviton 2 on, Apple M', ('asimd', 'asimddp'), 'neondot'),
    ProcessorClass('arm', 'Arm without them: Cortex-A72', ('asimd',), 'neon'),
    ProcessorClass('other', 'any other', (), 'portable'),
)


def class_of(features: Iterable[str]) -> ProcessorClass:
    """Return the highest class whose needs the features of a processor meet."""
    features = frozenset(features)
    return next(row for row in CLASSES if row.runs_on(features))


def features_behind(available: Iterable[str]) -> frozenset[str]:
    """Return the features that a processor must have, given the instruction sets of this package that it runs.

    Where classes share an instruction set, the lowest of them counts.
    """
    needs = {row.isa: row.needs for row in CLASSES}
    return frozenset(feature for isa in available for feature in needs.get(isa, ()))


def choose_class(name: str, features: Iterable[str]) -> ProcessorClass:
    """Return a class by name that a processor with these features is of, or can emulate.

    Raises:
        ValueError: The name is unknown, or that of a class that this processor cannot emulate.
    """
    features = frozenset(features)
    own = class_of(features)
    lower = [row for row in CLASSES[CLASSES.index(own) + 1:] if row.caps and row.runs_on(features)]
    for row in (own, *lower):
        if row.name == name:
            return row
    is_known = any(row.name == name for row in CLASSES)
    remedy = 'measure it on a processor of that class' if is_known else 'choose one of them'
    raise ValueError(
        f"processor class: found {name!r}, expected {own.name!r}, this processor's own, or a lower one that it can "
        f"emulate ({', '.join(row.name for row in lower) or 'none'}); {remedy}")


def caps_to_set(chosen: ProcessorClass, own: ProcessorClass, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `CAPS` that are still to be set so that a processor of class `own` runs as `chosen`.

    Raises:
        ValueError: One of `CAPS` is set to another value.
    """
    wanted = {} if chosen is own else chosen.caps
    for variable in CAPS:
        found, expected = environment.get(variable), wanted.get(variable)
        if found is not None and found != expected:
            raise ValueError(
                f'{variable}: found {found!r} in the environment, expected '
                f'{"none" if expected is None else repr(expected)} for the processor class {chosen.name!r}; unset it')
    return {variable: value for variable, value in wanted.items() if variable not in environment}
