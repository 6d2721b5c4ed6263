"""Every operation that the OpenCL backend claims, on the sample inputs of torch's own test suite.

`CLAIMED` is the one list: OpInfo's name, with the variant behind a dot where there is one. A short subset runs by
default, all of it with `-m slow`. How a result is judged: tests/opinfo_harness.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch.testing._internal.common_methods_invocations import op_db

from tests.opinfo_harness import check_operation


def _names(text: str) -> list[str]:
    return text.split()


def _functional(text: str) -> list[str]:
    return [f"nn.functional.{name}" for name in text.split()]


ELEMENTWISE = _names("""
    abs acos acosh add addcdiv addcmul asin asinh atan atan2 atanh bitwise_and bitwise_not ceil clamp clamp_max
    clamp_min clone copysign cos cosh deg2rad div.no_rounding_mode div.floor_rounding div.trunc_rounding eq erf erfc
    erfinv exp exp2 expm1 floor floor_divide fmax fmin fmod frac ge gt heaviside hypot isclose isfinite isinf isnan
    isneginf isposinf le lerp log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor
    logit lt masked_fill maximum minimum mul nan_to_num ne neg positive pow rad2deg reciprocal remainder round rsqrt
    rsub sgn sigmoid sign signbit sin sinc sinh sqrt square sub tan tanh true_divide trunc where xlogy ldexp
    float_power
""")
ACTIVATIONS = _functional("""
    celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish prelu relu relu6 selu
    silu softmin softplus softshrink softsign tanhshrink threshold
""")
LOSSES = _functional("""
    binary_cross_entropy binary_cross_entropy_with_logits cross_entropy huber_loss kl_div l1_loss mse_loss nll_loss
    smooth_l1_loss soft_margin_loss margin_ranking_loss hinge_embedding_loss poisson_nll_loss
""")
REDUCTIONS = _names("""
    all amax amin aminmax any argmax argmin count_nonzero cumprod cumsum dist linalg.vector_norm log_softmax logsumexp
    max.reduction_no_dim max.reduction_with_dim mean min.reduction_no_dim min.reduction_with_dim nansum norm prod
    softmax std std_mean sum var var_mean
""")
NORMS = _functional("cosine_similarity group_norm layer_norm normalize rms_norm")
# What is missing here has samples whose result's shape depends on data (narrow, tensor_split, repeat_interleave,
# index_put, index_fill), that are left to chance (empty...), that read around their input (as_strided), or whose
# gradients torch computes outside of the graph because a result is a view of an input (expand, diagonal, slice...).
LAYOUTS = [
    *_names("""
        unfold_copy squeeze squeeze.multiple squeeze_copy unsqueeze unsqueeze_copy split split.list_args
        split_with_sizes split_with_sizes_copy chunk unsafe_split unsafe_chunk unbind unbind_copy movedim narrow_copy
        expand_copy repeat tile flip fliplr flipud roll rot90 diagonal_copy diag diagflat diag_embed tril triu trace
        slice_scatter select_scatter diagonal_scatter constant_pad_nd cat stack hstack vstack dstack column_stack
        permute transpose t_copy view_copy reshape unflatten clone contiguous new_full fill eye linspace block_diag
        cartesian_prod tril_indices triu_indices diff index_select gather scatter scatter_add scatter_reduce.sum
        scatter_reduce.prod scatter_reduce.mean scatter_reduce.amax scatter_reduce.amin __getitem__ index_add
        index_copy index_reduce.prod index_reduce.mean index_reduce.amax index_reduce.amin masked_fill masked_scatter
        take put take_along_dim bucketize searchsorted isin topk sort argsort msort kthvalue _unsafe_masked_index
        _unsafe_masked_index_put_accumulate
    """),
    *_functional("""
        embedding pixel_shuffle pixel_unshuffle pad.constant pad.reflect pad.replicate pad.replicate_negative
        pad.circular
    """),
]
PRODUCTS = [
    *_names("""
        mm bmm addmm addmm.decomposed baddbmm mv dot vdot addmv addbmm addr outer inner matmul __rmatmul__ einsum
        tensordot kron linalg.multi_dot linalg.cross
    """),
    *_functional("linear bilinear"),
]

CLAIMED = dict.fromkeys([*ELEMENTWISE, *ACTIVATIONS, *LOSSES, *REDUCTIONS, *NORMS, *LAYOUTS, *PRODUCTS])
SHORT = ["add", "where", "sum", "amax", "var", "argmax", "nn.functional.gelu", "nn.functional.layer_norm"]
SHORT_SAMPLES = 3

_OPINFOS = {f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name: op for op in op_db}


def test_every_claimed_name_is_an_opinfo() -> None:
    assert not CLAIMED.keys() - _OPINFOS.keys()
    assert set(SHORT) <= CLAIMED.keys()


@pytest.mark.parametrize("name", SHORT)
def test_first_samples_agree_with_float64(name: str) -> None:
    check_operation(_opinfo(name), SHORT_SAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMED)
def test_all_samples_agree_with_float64(name: str) -> None:
    check_operation(_opinfo(name))


def _opinfo(name: str) -> Any:
    return _OPINFOS[name]
