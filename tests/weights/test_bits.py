"""The bit order, pinned by bytes."""
import pytest
import torch

from timm_el.weights.bits import pack_signs, pack_weight, unpack_signs, unpack_weight


def test_bit_order_is_least_significant_first_and_one_means_plus():
    x = torch.tensor([1., -1, -1, -1, -1, -1, -1, -1, 0., -0., float('nan')])
    assert pack_signs(x).tolist() == [0b00000001, 0b00000011]  # tail bits are zero


def test_weight_is_packed_along_input_channels():
    w = -torch.ones(2, 10, 3, 1)
    w[1, 9, 2, 0] = 1
    packed = pack_weight(w)
    assert packed.shape == (2, 3, 1, 2)
    assert packed.flatten().tolist() == [0] * 11 + [0b10]


@pytest.mark.parametrize('n', [1, 7, 8, 9, 16, 63, 130])
def test_round_trip(n):
    x = torch.randn(3, 5, n)
    assert torch.equal(unpack_signs(pack_signs(x), n), torch.where(x >= 0, 1., -1.))
    w = torch.randn(4, n, 3, 2)
    unpacked = unpack_weight(pack_weight(w), n, torch.float64)
    assert torch.equal(unpacked, torch.where(w >= 0, 1., -1.).double())
    assert unpacked.is_contiguous()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r'packed: found dtype torch.float32'):
        unpack_signs(torch.zeros(3), 8)
    with pytest.raises(ValueError, match=r'packed: found shape \(3,\), expected \(..., 2\) for n=9'):
        unpack_signs(torch.zeros(3, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match='0-D'):
        pack_signs(torch.tensor(1.))
    with pytest.raises(ValueError, match='4-D'):
        pack_weight(torch.zeros(3, 3))
