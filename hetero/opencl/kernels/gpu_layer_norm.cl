// Layer normalization of the rows of a matrix, forward and backward, on GPU-type devices; formulas: layer_norm.cl.
//
//   x, out, grad, residual, dx (R, D): x_row, x_col, ... strides, any. weight, bias, dweight, dbias (D): one stride each.
//   mean, rstd (R): contiguous. Absent operands: has_... = 0, any buffer in their place.
//   partial (chunks, 2, D) contiguous: of each chunk of chunk_rows rows its share of dweight and of dbias.
//
// Work-group: GROUP_X x GROUP_Y work-items. layer_norm, layer_norm_backward: GROUP_Y rows, GROUP_X work-items for each;
// ceil(R / GROUP_Y) groups. layer_norm_partial: GROUP_X columns, GROUP_Y work-items for each; (ceil(D / GROUP_X), chunks)
// groups. layer_norm_weights: a work-item a column; GROUP_Y is 1.
// Tolerance: 4 eps sqrt(D) of the largest |out|; the variance is summed in a second pass, without cancellation.
// Source: Ba, Kiros, Hinton, "Layer normalization", arXiv:1607.06450; the gradient is the derivative of the formulas.

#define ROW_OF_ITEM (int)(get_group_id(0) * GROUP_Y + Y)

KERNEL layer_norm(TENSOR(x), TENSOR(weight), TENSOR(bias), TENSOR_OUT(out), TENSOR_OUT(mean), TENSOR_OUT(rstd),
                  const int R, const int D, const int x_row, const int x_col, const int has_weight, const int weight_col,
                  const int has_bias, const int bias_col, const int out_row, const int out_col, const float eps)
{
    __local float memory[GROUP_ITEMS];
    const int r = ROW_OF_ITEM, n = r < R ? D : 0;
    __global const float *x = BASE(x) + (size_t)r * x_row;
    float sum = 0.0f, squares = 0.0f;
    for (int c = X; c < n; c += GROUP_X) sum += x[(size_t)c * x_col];
    const float m = sum_over_x(sum, memory) / D;
    for (int c = X; c < n; c += GROUP_X) {
        const float t = x[(size_t)c * x_col] - m;
        squares += t * t;
    }
    const float s = 1.0f / sqrt(sum_over_x(squares, memory) / D + eps);
    if (n > 0 && X == 0) {
        BASE(mean)[r] = m;
        BASE(rstd)[r] = s;
    }
    for (int c = X; c < n; c += GROUP_X) {
        float t = (x[(size_t)c * x_col] - m) * s;
        if (has_weight) t *= BASE(weight)[(size_t)c * weight_col];
        if (has_bias) t += BASE(bias)[(size_t)c * bias_col];
        BASE(out)[(size_t)r * out_row + (size_t)c * out_col] = t;
    }
}

KERNEL layer_norm_backward(TENSOR(grad), TENSOR(x), TENSOR(mean), TENSOR(rstd), TENSOR(weight), TENSOR(residual),
                           TENSOR_OUT(dx), const int R, const int D, const int grad_row, const int grad_col,
                           const int x_row, const int x_col, const int has_weight, const int weight_col,
                           const int has_residual, const int residual_row, const int residual_col, const int dx_row,
                           const int dx_col)
{
    __local float memory[GROUP_ITEMS];
    const int r = ROW_OF_ITEM, n = r < R ? D : 0;
    __global const float *x = BASE(x) + (size_t)r * x_row, *grad = BASE(grad) + (size_t)r * grad_row;
    const float m = n ? BASE(mean)[r] : 0.0f, s = n ? BASE(rstd)[r] : 0.0f;
    float sum = 0.0f, sum_xhat = 0.0f;
    for (int c = X; c < n; c += GROUP_X) {
        float h = grad[(size_t)c * grad_col];
        if (has_weight) h *= BASE(weight)[(size_t)c * weight_col];
        sum += h;
        sum_xhat += h * ((x[(size_t)c * x_col] - m) * s);
    }
    const float mean_h = sum_over_x(sum, memory) / D, mean_h_xhat = sum_over_x(sum_xhat, memory) / D;
    for (int c = X; c < n; c += GROUP_X) {
        float h = grad[(size_t)c * grad_col];
        if (has_weight) h *= BASE(weight)[(size_t)c * weight_col];
        float t = s * (h - mean_h - (x[(size_t)c * x_col] - m) * s * mean_h_xhat);
        if (has_residual) t += BASE(residual)[(size_t)r * residual_row + (size_t)c * residual_col];
        BASE(dx)[(size_t)r * dx_row + (size_t)c * dx_col] = t;
    }
}

KERNEL layer_norm_partial(TENSOR(grad), TENSOR(x), TENSOR(mean), TENSOR(rstd), TENSOR_OUT(partial), const int R, const int D,
                          const int chunk_rows, const int grad_row, const int grad_col, const int x_row, const int x_col)
{
    __local float memory[GROUP_ITEMS];
    const int c = get_global_id(0), first = get_group_id(1) * chunk_rows;
    const int last = c >= D ? 0 : R - first < chunk_rows ? R : first + chunk_rows;
    float w = 0.0f, b = 0.0f;
    for (int r = first + Y; r < last; r += GROUP_Y) {
        const float g = BASE(grad)[(size_t)r * grad_row + (size_t)c * grad_col];
        w += g * ((BASE(x)[(size_t)r * x_row + (size_t)c * x_col] - BASE(mean)[r]) * BASE(rstd)[r]);
        b += g;
    }
    w = sum_over_y(w, memory);
    b = sum_over_y(b, memory);
    if (Y == 0 && c < D) {
        __global float *target = BASE(partial) + (size_t)get_group_id(1) * 2 * D + c;
        target[0] = w;
        target[D] = b;
    }
}

KERNEL layer_norm_weights(TENSOR(partial), TENSOR_OUT(dweight), TENSOR_OUT(dbias), const int chunks, const int D,
                          const int has_dweight, const int dweight_col, const int has_dbias, const int dbias_col)
{
    const int c = get_global_id(0);
    if (c >= D) return;
    float w = 0.0f, b = 0.0f;
    for (int chunk = 0; chunk < chunks; chunk++) {
        w += BASE(partial)[(size_t)chunk * 2 * D + c];
        b += BASE(partial)[(size_t)chunk * 2 * D + D + c];
    }
    if (has_dweight) BASE(dweight)[(size_t)c * dweight_col] = w;
    if (has_dbias) BASE(dbias)[(size_t)c * dbias_col] = b;
}
