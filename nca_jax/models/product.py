"""The product of activations with a matrix of parameters, and its gradient by hand."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal

from nca_jax.models.nf4 import Nf4

Matrix = jax.Array | Nf4  # what has ndim, and is cast where it is used


@jax.custom_vjp
def product(x: jax.Array, kernel: Matrix) -> jax.Array:
    """[R, T, *in], [*in, *out] -> [R, T, *out] in the dtype of x; the kernel is cast to it.

    What is kept for the gradient is the kernel as it came: one in 4 bits is dequantised again.

    The gradient of the kernel has the kernel's dtype; it is x^T g or (g^T x)^T: whichever
    transposes the narrower of the two, which costs a CPU a copy. Automatic differentiation takes
    the latter.
    Of a kernel that nothing differentiates there is none, and x is not kept for it.
    """
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=x.ndim - 2)


def _product_forward(x: CustomVJPPrimal, kernel: Any):
    is_perturbed = any(part.perturbed for part in jax.tree.leaves(kernel))
    kernel = jax.tree.map(lambda part: part.value, kernel)
    return product(x.value, kernel), (x.value if is_perturbed else None, kernel)


def _product_backward(saved, grad):
    x, kernel = saved
    axes_out = grad.ndim - 2
    last = [tuple(range(y.ndim - axes_out, y.ndim)) for y in (grad, kernel)]
    grad_x = jnp.tensordot(grad, kernel.astype(grad.dtype), axes=last)
    if x is None:
        return grad_x, None
    if x.size <= grad.size:
        return grad_x, _outer(x, grad, kernel.dtype)
    outer = _outer(grad, x, kernel.dtype)
    return grad_x, jnp.moveaxis(outer, range(axes_out), range(-axes_out, 0))


def _outer(x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Sums over tokens: [R, T, *a], [R, T, *b] -> [*a, *b] in `dtype`."""
    tokens = (((0, 1), (0, 1)), ((), ()))
    return jax.lax.dot_general(x, y, tokens, preferred_element_type=dtype)


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)
