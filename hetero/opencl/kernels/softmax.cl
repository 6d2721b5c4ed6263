// softmax and log_softmax along one dimension, forward and backward.
//
//   softmax:      out = e / sum(e),  e = exp(x - max(x))           dx = out * (grad - sum(grad * out))
//   log_softmax:  out = x - max(x) - log(sum(e))                   dx = grad - exp(out) * sum(grad)
//
//   x, out, grad, output, dx (O, D, I): strides x_outer, x_col, x_inner, ... any; the sums run over D, O * I rows.
//   is_log: which of the two.
//
// Work-group: one work-item; a group does rows_per_group rows.
// Build constants: LANES, PLAIN (common.cl).
// Tolerance: 8 eps relative to the sum of e (softmax), absolute 4 eps max(1, |out|) (log_softmax).
// A row of -inf, or one with inf or NaN, gives NaN where torch gives NaN.
// Source: the definition; subtracting the maximum is exact algebra and prevents overflow.

#define ROW(x) (BASE(x) + (size_t)(r / I) * x##_outer + (size_t)(r % I) * x##_inner)
#define END(x) (BASE(x) + (size_t)(R / I - 1) * x##_outer + (size_t)(I - 1) * x##_inner + (size_t)(D - 1) * x##_col + 1)

KERNEL softmax(TENSOR(x), TENSOR_OUT(out), const int R, const int D, const int I, const int rows_per_group,
               const int is_log, const int x_outer, const int x_col, const int x_inner, const int out_outer,
               const int out_col, const int out_inner)
{
    __global const float *x_end = END(x), *out_end = END(out);
    FOR_ROWS(r, R, rows_per_group) {
        __global const float *x = ROW(x);
        __global float *out = ROW(out);
        vec largest[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        FOR_COLUMNS(c, u) largest[u] = larger(largest[u], GET_ROW(x, -INFINITY));
        // a NaN comes back in the sum
        const float m = larger_lanes(larger(larger(largest[0], largest[1]), larger(largest[2], largest[3])));
        FOR_COLUMNS(c, u) {
            const vec e = exp_nonpositive(GET_ROW(x, -INFINITY) - m);
            sums[u] += e;
            if (!is_log) PUT_ROW(out, e);
        }
        // lanes after column D hold exp(-inf - m) = 0; with m = -inf the row is NaN anyway
        const float sum = sum_parts(sums);
        if (is_log) {
            const float log_sum = log_(sum);
            for (int c = 0; c < D; c += LANES) PUT_ROW(out, GET_ROW(x, 0.0f) - m - log_sum);
        } else {
            const float scale = 1.0f / sum;
            for (int c = 0; c < D; c += LANES) PUT_ROW(out, GET_ROW(out, 0.0f) * scale);
        }
    }
}

KERNEL softmax_backward(TENSOR(grad), TENSOR(output), TENSOR_OUT(dx), const int R, const int D, const int I,
                        const int rows_per_group, const int is_log, const int grad_outer, const int grad_col,
                        const int grad_inner, const int output_outer, const int output_col, const int output_inner,
                        const int dx_outer, const int dx_col, const int dx_inner)
{
    __global const float *grad_end = END(grad), *output_end = END(output);
    FOR_ROWS(r, R, rows_per_group) {
        __global const float *grad = ROW(grad), *output = ROW(output);
        __global float *dx = ROW(dx);
        vec sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        FOR_COLUMNS(c, u) {
            const vec g = GET_ROW(grad, 0.0f);
            sums[u] += is_log ? g : g * GET_ROW(output, 0.0f);
        }
        const float sum = sum_parts(sums);
        for (int c = 0; c < D; c += LANES) {
            const vec g = GET_ROW(grad, 0.0f), y = GET_ROW(output, 0.0f);
            PUT_ROW(dx, is_log ? g - exp_nonpositive(y) * sum : y * (g - sum));
        }
    }
}
