"""Signs and their estimators against closed forms, on planted and on all 16-bit values."""
import math

import pytest
import torch

from timm_el.quantizers import (
    QUANTIZERS,
    WEIGHT_QUANTIZERS,
    approx_sign,
    approx_sign_definition,
    get_quantizer,
    sign,
    ste_sign,
    ste_sign_definition,
)

NAN, INF = math.nan, math.inf
PLANTED = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1e-30, -1e-30, 1.0000001, -1.0000001, 2.0, -3.0, INF, -INF, NAN]
SIGNS = [1, 1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, -1]
STE_GRADIENT = [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
APPROX_GRADIENT = [2, 2, 0, 0, 1, 1, 2, 2, 0, 0, 0, 0, 0, 0, 0]

ALL_FORMS = [ste_sign, ste_sign_definition, approx_sign, approx_sign_definition]


def gradient(f, x: torch.Tensor, upstream=1.0) -> torch.Tensor:
    x = x.clone().requires_grad_()
    y = f(x)
    return torch.autograd.grad(y, x, torch.full_like(y, upstream))[0]


def scripted(f):
    def call(x: torch.Tensor) -> torch.Tensor:
        return f(x)
    return torch.jit.script(f)


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, backend='inductor')


@pytest.mark.parametrize('f', [sign, *ALL_FORMS])
def test_sign_of_planted_values_is_exactly_one(f):
    assert f(torch.tensor(PLANTED)).tolist() == SIGNS


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('f', [sign, *ALL_FORMS])
def test_sign_is_exactly_one_on_every_16_bit_value(f, dtype):
    bits = torch.arange(-2 ** 15, 2 ** 15, dtype=torch.int16)
    x = bits.view(torch.float16 if dtype == torch.float32 else dtype).to(dtype)
    y = f(x)
    assert y.dtype == dtype
    assert torch.equal(y, torch.where(x >= 0, 1.0, -1.0).to(dtype))


@pytest.mark.parametrize('f', [ste_sign_definition, approx_sign_definition])
def test_definition_is_exact_on_float32_values_of_every_exponent(f):
    bits = torch.arange(0, 2 ** 32, 65521, dtype=torch.int64) - 2 ** 31
    x = bits.to(torch.int32).view(torch.float32)
    assert torch.equal(f(x), torch.where(x >= 0, 1.0, -1.0))


@pytest.mark.parametrize('wrap', [lambda f: f, scripted, compiled], ids=['eager', 'scripted', 'compiled'])
@pytest.mark.parametrize('f, expected', [(ste_sign, STE_GRADIENT), (approx_sign, APPROX_GRADIENT)])
def test_gradient_of_planted_values(f, expected, wrap):
    x = torch.tensor(PLANTED)
    assert wrap(f)(x).tolist() == SIGNS
    assert gradient(wrap(f), x).tolist() == expected


@pytest.mark.parametrize('lean, definition', [(ste_sign, ste_sign_definition), (approx_sign, approx_sign_definition)])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_lean_form_equals_definition(lean, definition, dtype):
    x = torch.cat([torch.tensor(PLANTED), torch.linspace(-1.5, 1.5, 1001)]).to(dtype)
    assert torch.equal(lean(x), definition(x))
    for upstream in (1.0, -0.37, INF):
        a, b = gradient(lean, x, upstream), gradient(definition, x, upstream)
        inside = x.abs() <= 1
        assert torch.all(a[~inside] == 0) and torch.all(b[~inside] == 0)
        if upstream != INF:
            torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=4e-3)


def test_approx_sign_gradient_is_the_derivative_of_its_curve():
    x = torch.linspace(-1.2, 1.2, 241, dtype=torch.float64)
    expected = torch.where(x.abs() <= 1, 2 - 2 * x.abs(), 0)
    torch.testing.assert_close(gradient(approx_sign, x), expected)


@pytest.mark.parametrize('f', [ste_sign, approx_sign])
def test_fx_keeps_the_estimator(f):
    class Module(torch.nn.Module):
        def forward(self, x):
            return f(x) * 2

    x = torch.tensor(PLANTED)
    traced = torch.fx.symbolic_trace(Module())
    assert torch.equal(traced(x), 2 * f(x))
    torch.testing.assert_close(gradient(traced, x), gradient(Module(), x))


def test_lean_ste_saves_one_byte_a_value():
    saved = []
    x = torch.randn(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ste_sign(x)
    assert sum(t.numel() * t.element_size() for t in saved) == 1000


@pytest.mark.filterwarnings('ignore:There is a performance drop')
def test_estimators_work_under_function_transforms():
    x = torch.randn(4, 5)
    grads = torch.func.vmap(torch.func.grad(lambda v: (ste_sign(v) * v.detach()).sum()))(x)
    torch.testing.assert_close(grads, torch.where(x.abs() <= 1, x, 0))


def test_unknown_quantizer_is_named():
    with pytest.raises(ValueError, match=r"input_quantizer: unknown quantizer 'foo', expected one of 'ste', 'approx'"):
        get_quantizer('foo', 'input_quantizer')
    assert get_quantizer(None)(x := torch.randn(3)) is x
    assert set(QUANTIZERS) == {'ste', 'approx', 'ternary', 'tanh', None}
    assert set(WEIGHT_QUANTIZERS) == {'ste', 'approx', 'twn', None}
