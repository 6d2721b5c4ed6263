// Negative log-likelihood of targets under given log-probabilities, forward and backward.
//
//   none: out[r] = -log_probs[r, target[r]];  sum: the sum of these;  mean: the sum / total_weight
//   total_weight = number of rows with target != ignore_index; ignored rows count 0 (mean of none: 0 / 0 = NaN, as torch)
//   dx[r, v] = -g where v = target[r] and r isn't ignored, else 0;  g = grad, grad / total_weight, or grad[r]
//
//   log_probs, dx (R, V): strides x_row, x_col, any. target (R) int64, out, grad (R or 1): one stride each.
//   reduction: 0 none, 1 mean, 2 sum (torch's numbers). A target outside [0, V) that isn't ignored gives NaN.
//
// Work-group: one work-item. nll_loss: ONE group: it reads one number a row, next to nothing beside the log_softmax before
// it, and the order of the sum is fixed. nll_loss_backward: a group does rows_per_group rows.
// Build constants: LANES, PLAIN (common.cl).
// Tolerance: (64 + R / 64) eps of the sum of |log_probs|: rows are summed 64 at a time.
// Source: the definition, with the conventions of torch.nn.functional.nll_loss.

KERNEL nll_loss(TENSOR(log_probs), TENSOR_INT64(target), TENSOR_OUT(out), TENSOR_OUT(total_weight), const int R, const int V,
                const int ignore_index, const int reduction, const int x_row, const int x_col, const int target_row,
                const int out_row)
{
    float total = 0.0f;
    int count = 0;
    for (int r0 = 0; r0 < R; r0 += 64) {
        float sum = 0.0f;
        for (int r = r0; r < R && r < r0 + 64; r++) {
            const long t = BASE(target)[(size_t)r * target_row];
            const int is_ignored = t == ignore_index;
            float loss = 0.0f;
            if (!is_ignored)
                loss = t >= 0 && t < V ? -BASE(log_probs)[(size_t)r * x_row + (size_t)t * x_col] : NAN;
            count += !is_ignored;
            sum += loss;
            if (reduction == 0) BASE(out)[(size_t)r * out_row] = loss;
        }
        total += sum;
    }
    // torch leaves total_weight 0 without a reduction
    BASE(total_weight)[0] = reduction == 0 ? 0.0f : (float)count;
    if (reduction == 1) BASE(out)[0] = total / (float)count;
    if (reduction == 2) BASE(out)[0] = total;
}

KERNEL nll_loss_backward(TENSOR(grad), TENSOR_INT64(target), TENSOR(total_weight), TENSOR_OUT(dx), const int R, const int V,
                         const int rows_per_group, const int ignore_index, const int reduction, const int grad_row,
                         const int target_row, const int dx_row, const int dx_col)
{
    const int D = V;
    FOR_ROWS(r, R, rows_per_group) {
        __global float *dx = BASE(dx) + (size_t)r * dx_row;
        const long t = BASE(target)[(size_t)r * target_row];
        const int is_ignored = t == ignore_index, is_valid = t >= 0 && t < V;
        const vec filling = is_ignored || is_valid ? 0.0f : NAN;
        for (int c = 0; c < V; c += LANES) PUT_ROW(dx, filling);
        if (is_ignored || !is_valid) continue;
        const float g = BASE(grad)[reduction == 0 ? (size_t)r * grad_row : 0];
        dx[(size_t)t * dx_col] = reduction == 1 ? -g / BASE(total_weight)[0] : -g;
    }
}
