// softmax and log_softmax along one dimension, forward and backward, on GPU-type devices; formulas: softmax.cl.
//
//   x, out, grad, output, dx (O, D, I): strides x_outer, x_col, x_inner, ... any; the sums run over D, O * I rows.
//   is_log: which of the two. out may be x itself.
//
// Work-group: GROUP_Y rows, GROUP_X work-items for each; ceil(R / GROUP_Y) groups. Where the rows lie side by side
// (I > 1) Python makes GROUP_X 1, so that neighbours do neighbouring rows.
// Tolerance: 8 eps relative to the sum of e (softmax), absolute 4 eps max(1, |out|) (log_softmax).
// A row of -inf, or one with inf or NaN, gives NaN where torch gives NaN.
// Source: the definition; subtracting the maximum is exact algebra and prevents overflow.

#define ROW(x) (BASE(x) + (size_t)(r / I) * x##_outer + (size_t)(r % I) * x##_inner)
#define AT(x) x[(size_t)c * x##_col]

KERNEL softmax(TENSOR(x), TENSOR_OUT(out), const int R, const int D, const int I, const int is_log, const int x_outer,
               const int x_col, const int x_inner, const int out_outer, const int out_col, const int out_inner)
{
    __local float memory[GROUP_ITEMS];
    const int r = get_group_id(0) * GROUP_Y + Y, n = r < R ? D : 0;
    __global const float *x = ROW(x);
    __global float *out = ROW(out);
    float largest = -INFINITY, sum = 0.0f;
    for (int c = X; c < n; c += GROUP_X) largest = larger(AT(x), largest);
    const float m = larger_over_x(largest, memory);  // a NaN comes back in the sum
    for (int c = X; c < n; c += GROUP_X) sum += exp(AT(x) - m);
    sum = sum_over_x(sum, memory);
    const float log_sum = log(sum), scale = 1.0f / sum;
    for (int c = X; c < n; c += GROUP_X) AT(out) = is_log ? AT(x) - m - log_sum : exp(AT(x) - m) * scale;
}

KERNEL softmax_backward(TENSOR(grad), TENSOR(output), TENSOR_OUT(dx), const int R, const int D, const int I,
                        const int is_log, const int grad_outer, const int grad_col, const int grad_inner,
                        const int output_outer, const int output_col, const int output_inner, const int dx_outer,
                        const int dx_col, const int dx_inner)
{
    __local float memory[GROUP_ITEMS];
    const int r = get_group_id(0) * GROUP_Y + Y, n = r < R ? D : 0;
    __global const float *grad = ROW(grad), *output = ROW(output);
    __global float *dx = ROW(dx);
    float sum = 0.0f;
    for (int c = X; c < n; c += GROUP_X) sum += is_log ? AT(grad) : AT(grad) * AT(output);
    sum = sum_over_x(sum, memory);
    for (int c = X; c < n; c += GROUP_X) {
        const float g = AT(grad), y = AT(output);
        AT(dx) = is_log ? g - exp(y) * sum : y * (g - sum);
    }
}
