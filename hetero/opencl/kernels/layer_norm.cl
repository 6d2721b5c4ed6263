// Layer normalization of the rows of a matrix, forward and backward.
//
//   xhat = (x - mean) * rstd,  mean = sum(x) / D,  rstd = 1 / sqrt(sum((x - mean)^2) / D + eps)
//   out  = xhat * weight + bias
//   dx   = rstd * (h - sum(h) / D - xhat * sum(h * xhat) / D) + residual,  h = grad * weight
//   dweight = sum over rows of grad * xhat,  dbias = sum over rows of grad
//
//   x, out, grad, residual, dx (R, D): x_row, x_col, ... strides, any. weight, bias, dweight, dbias (D): one stride each.
//   mean, rstd (R): contiguous. Absent operands: has_... = 0, any buffer in their place.
//   partial (groups, 2, padded) contiguous: a group's share of dweight and dbias; padded: D up to a multiple of 16.
//
// Work-group: one work-item; a group does rows_per_group rows. layer_norm_weights: a group does 16 columns.
// Build constants: LANES, PLAIN (common.cl).
// Tolerance: 4 eps sqrt(D) of the largest |out|; the variance is summed in a second pass, without cancellation.
// Source: Ba, Kiros, Hinton, "Layer normalization", arXiv:1607.06450; the gradient is the derivative of the lines above.

#define END(x) (BASE(x) + (size_t)(R - 1) * x##_row + (size_t)(D - 1) * x##_col + 1)
#define END_OF_VECTOR(x) (BASE(x) + (size_t)(D - 1) * x##_col + 1)

KERNEL layer_norm(TENSOR(x), TENSOR(weight), TENSOR(bias), TENSOR_OUT(out), TENSOR_OUT(mean), TENSOR_OUT(rstd),
                  const int R, const int D, const int rows_per_group, const int x_row, const int x_col,
                  const int has_weight, const int weight_col, const int has_bias, const int bias_col,
                  const int out_row, const int out_col, const float eps)
{
    __global const float *weight = BASE(weight), *bias = BASE(bias);
    __global const float *x_end = END(x), *weight_end = END_OF_VECTOR(weight), *bias_end = END_OF_VECTOR(bias);
    FOR_ROWS(r, R, rows_per_group) {
        __global const float *x = BASE(x) + (size_t)r * x_row;
        __global float *out = BASE(out) + (size_t)r * out_row;
        vec sum[4] = {0.0f, 0.0f, 0.0f, 0.0f}, squares[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        FOR_COLUMNS(c, u) sum[u] += GET_ROW(x, 0.0f);
        const float m = sum_parts(sum) / D;
        FOR_COLUMNS(c, u) {
            const vec t = GET_ROW(x, m) - m;
            squares[u] += t * t;
        }
        const float s = 1.0f / sqrt_(sum_parts(squares) / D + eps);
        BASE(mean)[r] = m;
        BASE(rstd)[r] = s;
        for (int c = 0; c < D; c += LANES) {
            vec t = (GET_ROW(x, m) - m) * s;
            if (has_weight) t *= GET_ROW(weight, 0.0f);
            if (has_bias) t += GET_ROW(bias, 0.0f);
            PUT_ROW(out, t);
        }
    }
}

KERNEL layer_norm_backward(TENSOR(grad), TENSOR(x), TENSOR(mean), TENSOR(rstd), TENSOR(weight), TENSOR(residual),
                           TENSOR_OUT(dx), TENSOR_OUT(partial), const int R, const int D, const int rows_per_group,
                           const int padded, const int grad_row, const int grad_col, const int x_row, const int x_col,
                           const int has_weight, const int weight_col, const int has_residual, const int residual_row,
                           const int residual_col, const int has_dx, const int dx_row, const int dx_col,
                           const int has_partial)
{
    __global float *dweight = BASE(partial) + (has_partial ? get_group_id(0) * 2 * padded : 0);
    __global float *dbias = dweight + padded;
    if (has_partial)
        for (int c = 0; c < 2 * padded; c += LANES) STORE(dweight + c, (vec)(0.0f));
    __global const float *x_end = END(x), *grad_end = END(grad);
    __global const float *residual_end = has_residual ? END(residual) : BASE(residual);
    __global const float *weight = BASE(weight), *weight_end = END_OF_VECTOR(weight);
    FOR_ROWS(r, R, rows_per_group) {
        __global const float *x = BASE(x) + (size_t)r * x_row;
        __global const float *grad = BASE(grad) + (size_t)r * grad_row;
        const float m = BASE(mean)[r], s = BASE(rstd)[r];
        vec sum[4] = {0.0f, 0.0f, 0.0f, 0.0f}, sum_xhat[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        FOR_COLUMNS(c, u) {
            const vec xhat = (GET_ROW(x, m) - m) * s;
            const vec g = GET_ROW(grad, 0.0f);
            vec h = g;
            if (has_weight) h *= GET_ROW(weight, 0.0f);
            sum[u] += h;
            sum_xhat[u] += h * xhat;
            if (has_partial) {
                STORE(dweight + c, LOAD(dweight + c) + g * xhat);
                STORE(dbias + c, LOAD(dbias + c) + g);
            }
        }
        if (!has_dx) continue;
        const float mean_h = sum_parts(sum) / D, mean_h_xhat = sum_parts(sum_xhat) / D;
        __global const float *residual = BASE(residual) + (size_t)r * residual_row;
        __global float *dx = BASE(dx) + (size_t)r * dx_row;
        for (int c = 0; c < D; c += LANES) {
            const vec xhat = (GET_ROW(x, m) - m) * s;
            vec h = GET_ROW(grad, 0.0f);
            if (has_weight) h *= GET_ROW(weight, 0.0f);
            vec t = s * (h - mean_h - xhat * mean_h_xhat);
            if (has_residual) t += GET_ROW(residual, 0.0f);
            PUT_ROW(dx, t);
        }
    }
}

KERNEL layer_norm_weights(TENSOR(partial), TENSOR_OUT(dweight), TENSOR_OUT(dbias), const int groups, const int D,
                          const int padded, const int has_dweight, const int dweight_col, const int has_dbias,
                          const int dbias_col)
{
    __global float *dweight = BASE(dweight), *dbias = BASE(dbias);
    for (int c = get_group_id(0) * 16; c < D && c < (int)(get_group_id(0) + 1) * 16; c += LANES) {
        vec w = 0.0f, b = 0.0f;
        for (int g = 0; g < groups; g++) {
            w += LOAD(BASE(partial) + (size_t)g * 2 * padded + c);
            b += LOAD(BASE(partial) + (size_t)g * 2 * padded + padded + c);
        }
        if (has_dweight) PUT_ROW(dweight, w);
        if (has_dbias) PUT_ROW(dbias, b);
    }
}
