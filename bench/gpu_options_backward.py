"""Time of the GPU backward with options, beside what torch has for them: SDPA with a mask, compiled FlexAttention."""

from functools import partial

import common
import gpu
import gpu_options
import torch

OURS = {"flash_ext": None, "gpu": "gpu"}


def rows():
    """(case, dtype): the forward's, also of head_dim 256, and a bias that gets a gradient."""
    for case, dtype in gpu_options.rows((64, 128, 256)):
        yield case, dtype
        if case.id.endswith("-bias"):
            yield gpu_options.Case(f"{case.id}-grad", *gpu_options.SIZES, case.head_dim), dtype


def calls(case, dtype, names):
    """name -> what to time: the gradients of q, k and v, and of a bias where it is asked for."""
    q, k, v = (x.requires_grad_() for x in common.tensors(case, dtype, "cuda"))
    grad_out = torch.randn_like(q)
    wants_mask = case.id.endswith("-grad")
    found = {}
    for name in names:
        mask = gpu_options.inputs(case)[1]
        leaves = [q, k, v]
        if wants_mask:
            if name == "Flex":
                continue  # it sums the gradient of a captured tensor element by element
            leaves.append(mask.requires_grad_())
        if name in OURS:
            make = partial(gpu_options.flash_ext_call, OURS[name])
        elif name == "Flex":
            make = gpu_options.flex_call
        else:
            make = partial(gpu_options.sdpa_call, gpu_options.SDPA[name])
        with gpu.without_what_fails(case, name):
            call = make(case, q, k, v, mask)
            if call is not None:
                found[name] = partial(torch.autograd.grad, call(), leaves, grad_out, retain_graph=True)
                found[name]()
    return found


if __name__ == "__main__":
    gpu.main(
        __doc__, "gpu-options-backward", list(rows()), calls, [*OURS], passes=(True,),
        peers_of=lambda case, dtype: gpu_options.ALL_PEERS,
    )  # fmt: skip
