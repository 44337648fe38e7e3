"""What torch must know about the ops besides their kernels: fakes, autograd, autocast, vmap (FLOP counts: flops.py)."""

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function, forward_ad

from . import flops  # noqa: F401
from .checks import acc_dtype, check_dense, check_dtype, check_same_device, check_varlen, fail, shape_of

ops = torch.ops.flash_ext
lib = torch.library.Library("flash_ext", "FRAGMENT")
below_autograd = torch._C._AutoDispatchBelowAutograd

# ---- fakes: shapes, strides and checks without data


def fake_attn_fwd(
    q, k, v, scale, window_left=-1, window_right=-1, top_left=False, out_bshd=False, softcap=0.0, dropout_p=0.0,
    attn_mask=None, alibi_slopes=None, sinks=None, rng_state=None, deterministic=False, kernels=0,
):  # fmt: skip
    check_dense(
        q, k, v, scale, window_left, window_right, softcap, dropout_p, attn_mask, alibi_slopes, sinks, rng_state
    )
    batch, heads_q, seq_q, _ = q.shape
    head_dim_v = v.shape[3]
    if out_bshd:
        out = q.new_empty(batch, seq_q, heads_q, head_dim_v).transpose(1, 2)
    else:
        out = q.new_empty(batch, heads_q, seq_q, head_dim_v)
    return out, q.new_empty(batch, heads_q, seq_q, dtype=acc_dtype(q.dtype))


def fake_attn_plain(q, k, v, *place):
    return fake_attn_fwd(q, k, v, *place)[0]


def fake_attn_bwd(
    grad_out, grad_lse, q, k, v, out, lse, scale, window_left, window_right, top_left, softcap, dropout_p, attn_mask,
    alibi_slopes, sinks, rng_state, need_mask_grad, deterministic, kernels=0,
):  # fmt: skip
    check_dense(
        q, k, v, scale, window_left, window_right, softcap, dropout_p, attn_mask, alibi_slopes, sinks, rng_state
    )
    out_shape = [*q.shape[:3], v.shape[3]]
    return fake_gradients(
        grad_out, grad_lse, q, k, v, out, lse, out_shape, q.shape[:3], attn_mask, sinks, need_mask_grad
    )


def fake_attn_plain_bwd(grad_out, q, k, v, out, lse, *place):
    return fake_attn_bwd(*as_attn_bwd(grad_out, q, k, v, out, lse, *place))[:3]


def as_attn_bwd(grad_out, q, k, v, out, lse, scale, window_left, window_right, top_left, deterministic):
    """attn_bwd's arguments for those of attn_plain_bwd."""
    return (
        grad_out, None, q, k, v, out, lse, scale, window_left, window_right, top_left, 0.0, 0.0, None, None, None, None,
        False, deterministic,
    )  # fmt: skip


def fake_attn_varlen_fwd(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, window_left=-1, window_right=-1,
    top_left=False, softcap=0.0, dropout_p=0.0, attn_mask=None, alibi_slopes=None, sinks=None, rng_state=None,
    deterministic=False, kernels=0,
):  # fmt: skip
    check_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, window_left, window_right, softcap,
        dropout_p, attn_mask, alibi_slopes, sinks, rng_state,
    )  # fmt: skip
    total_q, heads_q, _ = q.shape
    return q.new_empty(total_q, heads_q, v.shape[2]), q.new_empty(heads_q, total_q, dtype=acc_dtype(q.dtype))


def fake_attn_varlen_bwd(
    grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, window_left,
    window_right, top_left, softcap, dropout_p, attn_mask, alibi_slopes, sinks, rng_state, need_mask_grad,
    deterministic, kernels=0,
):  # fmt: skip
    check_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, window_left, window_right, softcap,
        dropout_p, attn_mask, alibi_slopes, sinks, rng_state,
    )  # fmt: skip
    total_q, heads_q, _ = q.shape
    out_shape, lse_shape = [total_q, heads_q, v.shape[2]], [heads_q, total_q]
    return fake_gradients(grad_out, grad_lse, q, k, v, out, lse, out_shape, lse_shape, attn_mask, sinks, need_mask_grad)


def fake_gradients(grad_out, grad_lse, q, k, v, out, lse, out_shape, lse_shape, attn_mask, sinks, need_mask_grad):
    acc = acc_dtype(q.dtype)
    for name, tensor, dtype, shape in (
        ("grad_out", grad_out, q.dtype, out_shape),
        ("out", out, q.dtype, out_shape),
        ("lse", lse, acc, lse_shape),
        ("grad_lse", lse if grad_lse is None else grad_lse, acc, lse_shape),
    ):
        if shape_of(tensor) != list(shape):
            fail(name, list(shape), shape_of(tensor))
        check_same_device(name, tensor, q)
        check_dtype(name, tensor, dtype)
    if need_mask_grad and (attn_mask is None or attn_mask.dtype == torch.bool):
        fail("need_mask_grad", "False without a floating-point attn_mask", need_mask_grad)
    dmask = attn_mask.new_empty(attn_mask.shape) if need_mask_grad else q.new_empty(0, dtype=acc)
    dsinks = q.new_empty(0 if sinks is None else q.shape[1], dtype=acc)
    return gradient_like(q), gradient_like(k), gradient_like(v), dmask, dsinks


def gradient_like(tensor):
    gradient = torch.empty_like(tensor)
    return gradient if gradient.stride(-1) == 1 or gradient.shape[-1] < 2 else gradient.new_empty(gradient.shape)


OPS = ("attn_fwd", "attn_plain", "attn_bwd", "attn_plain_bwd", "attn_varlen_fwd", "attn_varlen_bwd")
for name in OPS:
    torch.library.register_fake(f"flash_ext::{name}", globals()[f"fake_{name}"], lib=lib)

# ---- other devices: the dispatcher alone would not say which argument is on one


def refuse(fake):
    def kernel(*args):
        fake(*args)  # raises where they are mixed
        raise RuntimeError(f"flash_ext has no native kernel for tensors on {args[0].device.type}; use backend='math'")

    return kernel


for name in OPS:
    for key in ("CUDA", "MPS", "XPU"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"flash_ext::{name}", key):
            lib.impl(name, refuse(globals()[f"fake_{name}"]), key)

# ---- autograd: kernels of our own, because those of torch.library.register_autograd cost 40 us a call, fail in
# ---- torch.func.grad and drop forward-mode tangents silently


def nothing_to_differentiate():
    return not (
        torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def call_bwd(op, *args):
    if not nothing_to_differentiate():
        return op(*args)
    with below_autograd():  # save the kernel below its time
        return op(*args)


def call_below(op, args):
    with below_autograd():
        if not torch._C._are_functorch_transforms_active():
            return op(*args)
        # Function.forward runs without grad mode; the outer levels of functorch still differentiate.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return op(*args)


class Attn(Function):
    @staticmethod
    def forward(ctx, *args):
        out, lse = call_below(ops.attn_fwd.default, args)
        q, k, v, *numbers, attn_mask, alibi_slopes, sinks, rng_state, deterministic, kernels = args
        del numbers[4]  # out_bshd
        ctx.numbers, ctx.how = numbers, (deterministic, kernels)
        ctx.save_for_backward(q, k, v, out, lse, attn_mask, alibi_slopes, sinks, rng_state)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, *options = ctx.saved_tensors
        need_mask_grad, need_sinks_grad = ctx.needs_input_grad[10], ctx.needs_input_grad[12]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        dq, dk, dv, dmask, dsinks = call_bwd(
            ops.attn_bwd.default, grad_out, grad_lse, q, k, v, out, lse, *ctx.numbers, *options, need_mask_grad,
            *ctx.how,
        )  # fmt: skip
        dmask, dsinks = dmask if need_mask_grad else None, dsinks if need_sinks_grad else None
        return dq, dk, dv, *(None,) * 7, dmask, None, dsinks, None, None, None


class AttnPlain(Function):
    """Attn without options, for callers who know that what surrounds the call asks for nothing but autograd.

    by_token: tensors are [batch, seq, heads, head_dim]. They are transposed here, where autograd does not watch.
    """

    @staticmethod
    def forward(ctx, q, k, v, by_token, scale, window_left, window_right, top_left, out_bshd, deterministic):
        with below_autograd():
            views = (x.transpose(1, 2) for x in (q, k, v)) if by_token else (q, k, v)
            out, lse = ops.attn_fwd.default(*views, scale, window_left, window_right, top_left, out_bshd)
            if by_token:
                out = out.transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.by_token, ctx.place = by_token, (scale, window_left, window_right, top_left, deterministic)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        *tensors, lse = grad_out, *ctx.saved_tensors
        if nothing_to_differentiate():
            with below_autograd():
                grads = AttnPlain.gradients(ops.attn_plain_bwd.default, tensors, lse, ctx)
        else:
            grads = AttnPlain.gradients(lambda *args: ops.attn_bwd.default(*as_attn_bwd(*args))[:3], tensors, lse, ctx)
        return *grads, *(None,) * 7

    @staticmethod
    def gradients(op, tensors, lse, ctx):
        if ctx.by_token:
            tensors = (x.transpose(1, 2) for x in tensors)
        grads = op(*tensors, lse, *ctx.place)
        return (x.transpose(1, 2) for x in grads) if ctx.by_token else grads


# Neither the dispatcher nor a kernel in Python: a fifth of a training step's time on the host.
apply_attn_plain = super(Function, AttnPlain).apply


class AttnVarlen(Function):
    @staticmethod
    def forward(ctx, *args):
        out, lse = call_below(ops.attn_varlen_fwd.default, args)
        q, k, v, cu_seqlens_q, cu_seqlens_k, *numbers = args[:-6]
        *options, deterministic, kernels = args[-6:]
        ctx.numbers, ctx.how = numbers, (deterministic, kernels)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *options)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *options = ctx.saved_tensors
        need_mask_grad, need_sinks_grad = ctx.needs_input_grad[13], ctx.needs_input_grad[15]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        dq, dk, dv, dmask, dsinks = call_bwd(
            ops.attn_varlen_bwd.default, grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k,
            *ctx.numbers, *options, need_mask_grad, *ctx.how,
        )  # fmt: skip
        dmask, dsinks = dmask if need_mask_grad else None, dsinks if need_sinks_grad else None
        return dq, dk, dv, *(None,) * 10, dmask, None, dsinks, None, None, None


class FirstDerivative(Function):
    @staticmethod
    def forward(ctx, op, *args):
        return call_below(op, args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("flash_ext.attn has no second derivative on native backends; use backend='math'")


def apply(function, *args):
    # Function.apply insists on setup_context under functorch, which our level of the dispatcher has dealt with already.
    single_level_apply = super(Function, function).apply
    if torch._C._are_functorch_transforms_active():
        with enable_single_level_autograd_function():
            return single_level_apply(*args)
    return single_level_apply(*args)


def refuse_tangents(args):
    if forward_ad._current_level >= 0:
        for arg in args:
            if isinstance(arg, torch.Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
                raise RuntimeError(
                    "flash_ext.attn has no forward-mode derivative on native backends; use backend='math'"
                )


def differentiate_fwd(function, op, args, alibi_slopes):
    refuse_tangents(args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        if alibi_slopes is not None and alibi_slopes.requires_grad:
            raise RuntimeError("alibi_slopes: has no gradient on native backends; use backend='math', or detach it")
        return apply(function, *args)
    with below_autograd():
        return op(*args)


def autograd_attn_fwd(
    q, k, v, scale, window_left=-1, window_right=-1, top_left=False, out_bshd=False, softcap=0.0, dropout_p=0.0,
    attn_mask=None, alibi_slopes=None, sinks=None, rng_state=None, deterministic=False, kernels=0,
):  # fmt: skip
    args = (
        q, k, v, scale, window_left, window_right, top_left, out_bshd, softcap, dropout_p, attn_mask, alibi_slopes,
        sinks, rng_state, deterministic, kernels,
    )  # fmt: skip
    return differentiate_fwd(Attn, ops.attn_fwd.default, args, alibi_slopes)


def autograd_attn_varlen_fwd(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, window_left=-1, window_right=-1,
    top_left=False, softcap=0.0, dropout_p=0.0, attn_mask=None, alibi_slopes=None, sinks=None, rng_state=None,
    deterministic=False, kernels=0,
):  # fmt: skip
    args = (
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, window_left, window_right, top_left,
        softcap, dropout_p, attn_mask, alibi_slopes, sinks, rng_state, deterministic, kernels,
    )  # fmt: skip
    return differentiate_fwd(AttnVarlen, ops.attn_varlen_fwd.default, args, alibi_slopes)


def autograd_attn_plain(q, k, v, *place):
    """Where there is something to differentiate, lse is needed."""
    return ops.attn_fwd.default(q, k, v, *place)[0]


def autograd_attn_plain_bwd(*args):
    return ops.attn_bwd.default(*as_attn_bwd(*args))[:3]


def autograd_bwd(op):
    def kernel(*args):
        refuse_tangents(args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return apply(FirstDerivative, op, *args)
        with below_autograd():
            return op(*args)

    return kernel


lib.impl("attn_fwd", autograd_attn_fwd, "Autograd")
lib.impl("attn_varlen_fwd", autograd_attn_varlen_fwd, "Autograd")
lib.impl("attn_plain", autograd_attn_plain, "Autograd")
lib.impl("attn_bwd", autograd_bwd(ops.attn_bwd.default), "Autograd")
lib.impl("attn_plain_bwd", autograd_attn_plain_bwd, "Autograd")
lib.impl("attn_varlen_bwd", autograd_bwd(ops.attn_varlen_bwd.default), "Autograd")

# ---- autocast: q, k, v as scaled_dot_product_attention does; masks, slopes and sinks stay


def autocast_fwd(op, device_type, key):
    def kernel(q, k, v, *args):
        dtype = torch.get_autocast_dtype(device_type)
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(q, k, v, *args)

    return kernel


for device_type, key in (("cpu", torch._C.DispatchKey.AutocastCPU), ("cuda", torch._C.DispatchKey.AutocastCUDA)):
    lib.impl("attn_fwd", autocast_fwd(ops.attn_fwd.default, device_type, key), key.name)
    lib.impl("attn_plain", autocast_fwd(ops.attn_plain.default, device_type, key), key.name)
    lib.impl("attn_varlen_fwd", autocast_fwd(ops.attn_varlen_fwd.default, device_type, key), key.name)

# ---- vmap: a mapped dimension becomes part of batch; a loop where something belongs to the whole batch


def fold(tensor, dim, size, batch):
    """[size * batch, ...] of a tensor [batch or 1, ...] that is mapped over one more dimension, dim, or over none."""
    if tensor is None:
        return None
    tensor = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
    return tensor.expand(size, batch, *tensor.shape[2:]).flatten(0, 1)


def fold_slopes(alibi_slopes, dim, size, batch):
    if alibi_slopes is None or (dim is None and alibi_slopes.dim() == 1):
        return alibi_slopes
    if dim is not None and alibi_slopes.dim() == 2:  # [heads] each
        alibi_slopes, dim = alibi_slopes.movedim(dim, 0).unsqueeze(1), 0
    return fold(alibi_slopes, dim, size, batch)


def batch_of(q, dim):
    return q.shape[1 if dim == 0 else 0]


def with_defaults(op, args, in_dims):
    missing = op._schema.arguments[len(args) :]
    return (*args, *(argument.default_value for argument in missing)), (*in_dims, *(None for _ in missing))


def loop(op, size, args, in_dims):
    results = []
    for n in range(size):
        results.append(
            op(*(arg if dim is None else arg.select(dim, n) for arg, dim in zip(args, in_dims, strict=True)))
        )
    return tuple(torch.stack(result) for result in zip(*results, strict=True)), (0,) * len(results[0])


def vmap_attn_fwd(info, in_dims, *args):
    op, size = ops.attn_fwd.default, info.batch_size
    args, in_dims = with_defaults(op, args, in_dims)
    q, k, v, *numbers, attn_mask, alibi_slopes, sinks, rng_state, deterministic, kernels = args
    mask_dim, slopes_dim, sinks_dim = in_dims[10:13]
    if sinks_dim is not None or rng_state is not None:
        return loop(op, size, args, in_dims)
    batch = batch_of(q, in_dims[0])
    q, k, v = (fold(x, dim, size, batch) for x, dim in zip((q, k, v), in_dims[:3], strict=True))
    if attn_mask is not None and (mask_dim is not None or attn_mask.shape[0] != 1):
        attn_mask = fold(attn_mask, mask_dim, size, batch)
    alibi_slopes = fold_slopes(alibi_slopes, slopes_dim, size, batch)
    results = op(q, k, v, *numbers, attn_mask, alibi_slopes, sinks, rng_state, deterministic, kernels)
    return tuple(x.unflatten(0, (size, batch)) for x in results), (0, 0)


def vmap_attn_plain(info, in_dims, *args):
    (out, _), (dim, _) = vmap_attn_fwd(info, in_dims, *args)
    return out, dim


def vmap_attn_bwd(info, in_dims, *args):
    op, size = ops.attn_bwd.default, info.batch_size
    args, in_dims = with_defaults(op, args, in_dims)
    numbers, (attn_mask, alibi_slopes, sinks, rng_state, need_mask_grad, *how) = args[7:13], args[13:]
    mask_dim, slopes_dim = in_dims[13:15]
    if sinks is not None or rng_state is not None:  # dsinks is a sum over the batch
        return loop(op, size, args, in_dims)
    batch = batch_of(args[2], in_dims[2])
    tensors = [fold(x, dim, size, batch) for x, dim in zip(args[:7], in_dims[:7], strict=True)]
    tensors[6] = tensors[6].contiguous()  # lse
    sum_mask_grad = False
    if attn_mask is not None and (mask_dim is not None or attn_mask.shape[0] != 1 or need_mask_grad):
        sum_mask_grad = attn_mask.shape[1 if mask_dim == 0 else 0] == 1  # a gradient for each call, over its batch
        attn_mask = fold(attn_mask, mask_dim, size, batch)
    alibi_slopes = fold_slopes(alibi_slopes, slopes_dim, size, batch)
    dq, dk, dv, dmask, dsinks = op(*tensors, *numbers, attn_mask, alibi_slopes, sinks, rng_state, need_mask_grad, *how)
    dq, dk, dv = (x.unflatten(0, (size, batch)) for x in (dq, dk, dv))
    if need_mask_grad:
        dmask = dmask.unflatten(0, (size, batch))
        if sum_mask_grad:
            dmask = dmask.sum(1, keepdim=True)
    return (dq, dk, dv, dmask, dsinks), (0, 0, 0, 0 if need_mask_grad else None, None)


def vmap_attn_plain_bwd(info, in_dims, *args):
    results, dims = vmap_attn_bwd(info, as_attn_bwd(*in_dims), *as_attn_bwd(*args))
    return results[:3], dims[:3]


def vmap_loop(op):
    def rule(info, in_dims, *args):
        return loop(op, info.batch_size, *with_defaults(op, args, in_dims))

    return rule


torch.library.register_vmap("flash_ext::attn_fwd", vmap_attn_fwd, lib=lib)
torch.library.register_vmap("flash_ext::attn_plain", vmap_attn_plain, lib=lib)
torch.library.register_vmap("flash_ext::attn_bwd", vmap_attn_bwd, lib=lib)
torch.library.register_vmap("flash_ext::attn_plain_bwd", vmap_attn_plain_bwd, lib=lib)
torch.library.register_vmap("flash_ext::attn_varlen_fwd", vmap_loop(ops.attn_varlen_fwd.default), lib=lib)
torch.library.register_vmap("flash_ext::attn_varlen_bwd", vmap_loop(ops.attn_varlen_bwd.default), lib=lib)
