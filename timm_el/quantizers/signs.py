"""Signs without a gradient: Sign and its ternary relative."""
import torch


def sign(x: torch.Tensor) -> torch.Tensor:
    """Return Sign(x) with Sign(0) = +1 (paper, eq. 1). The sign of zero is decided here and nowhere else.

    Sign(x) = +1 if x >= 0 else -1. Hence -0.0 gives +1 and NaN gives -1. No gradient.

    Args:
        x: Float tensor of any shape.

    Returns:
        Tensor of -1 and +1, same shape and dtype.
    """
    # Comparing in place stays in floats: on CPU it is several times faster than a detour over bool and where().
    return x.clone().ge_(0).mul_(2).sub_(1)


def sign_definition(x: torch.Tensor) -> torch.Tensor:
    """Return `sign` of x out of place, as graph formats need it: ONNX has no comparison in place."""
    return (x >= 0).to(x.dtype) * 2 - 1


def ternary(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Return +1 where x >= threshold, -1 where x <= -threshold, else 0 (also for NaN, and where both hold).

    No gradient.

    Args:
        x: Float tensor of any shape.
        threshold: Not negative; a shape that broadcasts to that of x.

    Returns:
        Tensor of -1, 0 and +1, shape and dtype of x.
    """
    return (x >= threshold).to(x.dtype) - (x <= -threshold).to(x.dtype)
