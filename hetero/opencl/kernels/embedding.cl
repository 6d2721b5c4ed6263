// Rows of a table, and the gradient of the table.
//
//   out[r, :] = weight[indices[r], :]
//   dweight[v, :] = sum over r with indices[r] = v, v != padding_idx, of grad[r, :], r ascending
//
//   weight, dweight (V, D), out, grad (R, D): strides weight_row, weight_col, ... any. indices (R) int64: one stride.
//   An index outside [0, V) gives a row of NaN; in the gradient it is left out.
//
// Work-group: one work-item. embedding: a group does rows_per_group rows; embedding_backward: cols_per_group columns of the
// whole table (a multiple of LANES): no two groups write the same element, so there are no atomics and one order.
// Build constants: LANES, PLAIN (common.cl).
// Tolerance: forward exact; backward n eps of the sum of |grad| over the n rows of one index.
// Source: the definition.

KERNEL embedding(TENSOR(weight), TENSOR_INT64(indices), TENSOR_OUT(out), const int R, const int V, const int D,
                 const int rows_per_group, const int weight_row, const int weight_col, const int index_stride,
                 const int out_row, const int out_col)
{
    __global const float *w_end = BASE(weight) + (size_t)(V - 1) * weight_row + (size_t)(D - 1) * weight_col + 1;
    const int w_col = weight_col;
    FOR_ROWS(r, R, rows_per_group) {
        const long v = BASE(indices)[(size_t)r * index_stride];
        const int is_valid = v >= 0 && v < V;
        __global const float *w = BASE(weight) + (is_valid ? (size_t)v * weight_row : 0);
        __global float *out = BASE(out) + (size_t)r * out_row;
        for (int c = 0; c < D; c += LANES) {
            vec t = NAN;
            if (is_valid) t = GET_ROW(w, 0.0f);
            PUT_ROW(out, t);
        }
    }
}

KERNEL embedding_backward(TENSOR(grad), TENSOR_INT64(indices), TENSOR_OUT(dweight), const int R, const int V, const int D,
                          const int cols_per_group, const int padding_idx, const int grad_row, const int grad_col,
                          const int index_stride, const int dweight_row, const int dweight_col)
{
    const int c0 = get_group_id(0) * cols_per_group;
    const int c1 = D - c0 < cols_per_group ? D : c0 + cols_per_group;
    __global const float *g_end = BASE(grad) + (size_t)(R - 1) * grad_row + (size_t)(D - 1) * grad_col + 1;
    const int g_col = grad_col, w_col = dweight_col;
    for (int v = 0; v < V; v++) {
        __global float *w = BASE(dweight) + (size_t)v * dweight_row;
        for (int c = c0; c < c1; c += LANES) PUT_ROW(w, (vec)(0.0f));
    }
    for (int r = 0; r < R; r++) {
        const long v = BASE(indices)[(size_t)r * index_stride];
        if (v == padding_idx || v < 0 || v >= V) continue;
        __global const float *g = BASE(grad) + (size_t)r * grad_row;
        __global float *w = BASE(dweight) + (size_t)v * dweight_row;
        __global const float *w_end = w;  // what lies behind the row belongs to another group
        for (int c = c0; c < c1; c += LANES) PUT_ROW(w, GET_ROW(w, 0.0f) + GET_ROW(g, 0.0f));
    }
}
