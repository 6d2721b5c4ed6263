// Negative log-likelihood under given log-probabilities on GPU-type devices; formulas and conventions: cross_entropy.cl.
//
//   log_probs, dx (R, V): strides x_row, x_col, any. target (R) int64, out, grad (R or 1): one stride each.
//   reduction: 0 none, 1 mean, 2 sum (torch's numbers). A target outside [0, V) that isn't ignored gives NaN.
//
// Work-group: GROUP_X work-items, GROUP_Y is 1. nll_loss: ONE group: it reads one number a row, next to nothing beside the
// log_softmax before it, and the order of the sum is fixed. nll_loss_backward: a work-item an element;
// (R, ceil(V / GROUP_X)) groups.
// Tolerance: (R / GROUP_X + log2 GROUP_X) eps of the sum of |log_probs|.
// Source: the definition, with the conventions of torch.nn.functional.nll_loss.

KERNEL nll_loss(TENSOR(log_probs), TENSOR_INT64(target), TENSOR_OUT(out), TENSOR_OUT(total_weight), const int R, const int V,
                const int ignore_index, const int reduction, const int x_row, const int x_col, const int target_row,
                const int out_row)
{
    __local float memory[GROUP_ITEMS];
    float total = 0.0f, count = 0.0f;  // a count is exact up to 2^24 rows
    for (int r = X; r < R; r += GROUP_X) {
        const long t = BASE(target)[(size_t)r * target_row];
        float loss = 0.0f;
        if (t != ignore_index) {
            loss = t >= 0 && t < V ? -BASE(log_probs)[(size_t)r * x_row + (size_t)t * x_col] : NAN;
            count += 1.0f;
        }
        total += loss;
        if (reduction == 0) BASE(out)[(size_t)r * out_row] = loss;
    }
    total = sum_over_x(total, memory);
    count = sum_over_x(count, memory);
    if (X != 0) return;
    // torch leaves total_weight 0 without a reduction
    BASE(total_weight)[0] = reduction == 0 ? 0.0f : count;
    if (reduction != 0) BASE(out)[0] = reduction == 1 ? total / count : total;
}

KERNEL nll_loss_backward(TENSOR(grad), TENSOR_INT64(target), TENSOR(total_weight), TENSOR_OUT(dx), const int R, const int V,
                         const int ignore_index, const int reduction, const int grad_row, const int target_row,
                         const int x_row, const int x_col)
{
    const int r = get_group_id(0), v = get_group_id(1) * GROUP_X + X;
    if (v >= V) return;
    const long t = BASE(target)[(size_t)r * target_row];
    float d = 0.0f;
    if (t != ignore_index) {
        if (t == v) {
            d = -BASE(grad)[reduction == 0 ? (size_t)r * grad_row : 0];
            if (reduction == 1) d /= BASE(total_weight)[0];
        }
        if (t < 0 || t >= V) d = NAN;
    }
    BASE(dx)[(size_t)r * x_row + (size_t)v * x_col] = d;
}
